//! How this room calls dockerd: blocking, with a deadline, errors as faults without secrets.

use crate::model::{Code, Fault, Res};
use bollard::Docker as Client;
use bollard::errors::Error;
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::Value;
use std::future::Future;
use std::time::Duration;

/// Patience with a call that only looks or makes a small thing. A volume plugin that is down costs dockerd 30 s.
pub(super) const QUICK: Duration = Duration::from_secs(45);
/// Patience with a start: mount, network, runtime.
pub(super) const START: Duration = Duration::from_secs(120);
/// Patience with one piece of an image stream; dockerd lays a whole archive out before it sends the first byte.
pub(super) const PIECE: Duration = Duration::from_secs(600);
/// Largest JSON answer that is believed, in bytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// What came of a call: a thing that is not there is an answer, not an error.
pub(super) fn found<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs `future` on the runtime from this (non-runtime) thread, for at most `patience`.
pub(super) fn wait<T>(
    runtime: &tokio::runtime::Handle,
    thing: &str,
    patience: Duration,
    future: impl Future<Output = Result<T, Error>>,
) -> Res<T> {
    match runtime.block_on(async { tokio::time::timeout(patience, future).await }) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(fault(thing, &error, &[])),
        Err(_) => Err(timed_out(thing, patience)),
    }
}

/// The fault of a call that dockerd did not answer in time.
pub(super) fn timed_out(thing: &str, patience: Duration) -> Fault {
    Fault::new(
        Code::TimedOut,
        thing,
        format!("dockerd did not answer within {} s", patience.as_secs()),
        "see whether dockerd hangs (a volume plugin that is down is the usual cause), then repeat the command",
    )
}

/// Turns dockerd's answer into a fault; every one of `secrets` is taken out of its words.
pub(super) fn fault(thing: &str, error: &Error, secrets: &[String]) -> Fault {
    let (code, next) = match error {
        Error::RequestTimeoutError => (Code::TimedOut, "see whether dockerd hangs, then repeat the command"),
        Error::SocketNotFoundError(_) | Error::HyperLegacyError { .. } => {
            (Code::DockerError, "start dockerd, or set docker_socket to where it listens")
        }
        _ => (Code::DockerError, "see dockerd's own log for more"),
    };
    let cause = match error {
        Error::DockerResponseServerError { status_code, message } => format!("dockerd says ({status_code}): {}", message.trim()),
        other => other.to_string(),
    };
    Fault::new(code, thing, redact(&cause, secrets), next)
}

/// Takes secrets out of a text that may be printed, and bounds its length.
pub(super) fn redact(text: &str, secrets: &[String]) -> String {
    let mut clean = text.to_string();
    for secret in secrets {
        clean = clean.replace(secret.as_str(), "***");
    }
    match clean.char_indices().nth(1000) {
        Some((at, _)) => format!("{}...", &clean[..at]),
        None => clean,
    }
}

/// One call whose answer, and body, stay raw JSON: bollard's types would drop the fields that they do not know, and its debug
/// log would print what passes through them (a container's environment, for one). `path` begins after the version.
pub(super) async fn raw(client: &Client, post: bool, path: &str, body: Option<&Value>) -> Result<Value, Error> {
    let version = client.client_version();
    let path = format!("/v{}.{}{path}", version.major_version, version.minor_version);
    let body = body.map(|value| Bytes::from(value.to_string()));
    let client = client.clone().with_request_modifier(move |mut request| {
        let mut parts = request.uri().clone().into_parts();
        parts.path_and_query = path.parse().ok();
        if let Ok(uri) = parts.try_into() {
            *request.uri_mut() = uri;
        }
        if post && let Ok(method) = "POST".parse() {
            *request.method_mut() = method;
        }
        if let Some(bytes) = &body {
            // A stream, although it is one piece: a full body would be printed by bollard's trace log.
            let bytes = bytes.clone();
            *request.body_mut() = bollard::body_stream(futures_util::stream::once(async move { bytes }));
        }
        request
    });
    // The one public call that hands a GET's body out as it is; the modifier above sends it where we want.
    let mut stream = client.export_container("raw");
    let mut answer = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        if answer.len() + piece.len() > ANSWER_BYTES_MAX {
            return Err(Error::DockerStreamError { error: format!("an answer of more than {ANSWER_BYTES_MAX} bytes") });
        }
        answer.extend_from_slice(&piece);
    }
    match answer.is_empty() {
        true => Ok(Value::Null),
        false => Ok(serde_json::from_slice(&answer)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_survive_into_a_fault() {
        let error = Error::DockerResponseServerError { status_code: 400, message: "invalid variable: PW=hunter2 hunter2".into() };
        let fault = fault("container db", &error, &["hunter2".into()]);
        assert!(!fault.to_string().contains("hunter2"), "{fault}");
        assert!(fault.to_string().contains("PW=***"), "{fault}");
    }

    #[test]
    fn a_long_answer_is_cut_at_a_character() {
        let text = "é".repeat(5000);
        assert!(redact(&text, &[]).chars().count() <= 1003);
    }
}
