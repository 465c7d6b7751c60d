//! Containers: captured on the primary, made from the recipe on the standby, started, looked after.

use crate::docker::call;
use crate::docker::image;
use crate::docker::network;
use crate::docker::recipe::{self, Here, LABEL_RECIPE, Recipe};
use crate::docker::volume;
use crate::docker::{Docker, Running};
use crate::model::{Code, ContainerSpec, Fault, Res, check_name};
use bollard::errors::Error;
use bollard::query_parameters::{KillContainerOptionsBuilder, RemoveContainerOptionsBuilder, StartContainerOptions};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Between two looks at a container's health.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A container without a health check must still run after this long.
const SETTLED: Duration = Duration::from_millis(100);
/// dockerd may say for a while that a process runs which has ended: this long it is asked again when the process is not there.
const HEARSAY: Duration = Duration::from_secs(2);

fn thing(name: &str) -> String {
    format!("container {name}")
}

/// What `docker inspect` says of a container, every field of it. dockerd also takes the beginning of an id for a name (`db`
/// begins one id in 256): what it found so by chance is another container.
fn look(docker: &Docker, name: &str) -> Res<Option<Value>> {
    check_name("container", name)?;
    let path = format!("/containers/{name}/json");
    let found =
        docker.wait(&thing(name), call::QUICK, async { call::found(call::raw(&docker.client, false, &path, None).await) })?;
    let meant = |inspect: &Value| text(inspect, "/Name").trim_start_matches('/') == name || is_id(text(inspect, "/Id"), name);
    Ok(found.filter(meant))
}

/// Whether a name is an id, at least as long as `docker ps` shows it.
fn is_id(id: &str, name: &str) -> bool {
    name.len() >= 12 && id.starts_with(name)
}

fn must(docker: &Docker, name: &str) -> Res<Value> {
    let missing = || Fault::new(Code::DockerError, thing(name), "there is none of this name", "see `docker ps -a`");
    look(docker, name)?.ok_or_else(missing)
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub(super) fn mounts(docker: &Docker, container: &str) -> Res<Vec<(String, String)>> {
    let inspect = must(docker, container)?;
    let mut mounts = Vec::new();
    for mount in inspect["Mounts"].as_array().into_iter().flatten() {
        let kind = text(mount, "/Type");
        let source = match kind {
            "volume" => text(mount, "/Name"),
            "tmpfs" => text(mount, "/Destination"),
            _ => text(mount, "/Source"),
        };
        mounts.push((kind.to_string(), source.to_string()));
    }
    Ok(mounts)
}

pub(super) fn capture(docker: &Docker, container: &str) -> Res<ContainerSpec> {
    let mut inspect = must(docker, container)?;
    network::capture(docker, &mut inspect)?;
    let name = text(&inspect, "/Name").trim_start_matches('/').to_string();
    check_name("container", &name)?;
    // A container that we made names its image by a local id; its label has the name that people know.
    let label = inspect.pointer("/Config/Labels").and_then(|labels| labels.get(recipe::LABEL_IMAGE)).and_then(Value::as_str);
    let image = image::pin(docker, text(&inspect, "/Image"), label.unwrap_or(text(&inspect, "/Config/Image")))?;
    Ok(ContainerSpec { name, image, inspect })
}

pub(super) fn ensure(docker: &Docker, spec: &ContainerSpec, image_id: &str) -> Res<bool> {
    let image = image::look(docker, image_id)?.ok_or_else(|| {
        Fault::new(
            Code::ImageMissing,
            thing(&spec.name),
            format!("its image {image_id} is not on this host"),
            "import the image again",
        )
    })?;
    let image_has_entrypoint = image.config.and_then(|config| config.entrypoint).is_some_and(|entrypoint| !entrypoint.is_empty());
    let api_minor = docker.client.client_version().minor_version;
    let recipe = recipe::build(spec, Here { image_id, image_has_entrypoint, api_minor })?;

    if let Some(have) = look(docker, &spec.name)? {
        let label = have.pointer("/Config/Labels").and_then(|labels| labels.get(LABEL_RECIPE)).and_then(Value::as_str);
        let taken =
            |cause: &str| Fault::new(Code::NameTaken, thing(&spec.name), cause, "rename or remove it (docker rename, docker rm)");
        match label {
            None => return Err(taken("one of this name exists that is not ours")),
            Some(digest) if digest == recipe.digest && text(&have, "/Image") == image_id => {
                // A crash may have come between create and connect.
                return connect(docker, spec, &recipe, &have);
            }
            // Never started: nothing was ever in it, and it was made by us for exactly this moment.
            Some(_) if text(&have, "/State/Status") == "created" => remove(docker, &spec.name)?,
            Some(_) => return Err(taken("ours, but it has run with another recipe or image, and may hold something")),
        }
    }
    for name in &recipe.volumes {
        check_volume(docker, spec, name)?;
    }
    for (name, _) in &recipe.networks {
        network::ensure(docker, name, definition_of(spec, name))?;
    }
    let path = format!("/containers/create?name={}", spec.name);
    call(docker, &spec.name, &recipe.secrets, true, &path, Some(&recipe.body))?;
    let made = must(docker, &spec.name)?;
    connect(docker, spec, &recipe, &made)?;
    Ok(true)
}

/// A raw call whose errors are cleaned of the recipe's secrets.
fn call(docker: &Docker, name: &str, secrets: &[String], post: bool, path: &str, body: Option<&Value>) -> Res<Value> {
    let answer = docker.wait(&thing(name), call::START, async { Ok(call::raw(&docker.client, post, path, body).await) })?;
    answer.map_err(|error| call::fault(&thing(name), &error, secrets))
}

/// dockerd makes an empty plain volume for a name that it does not know, and would mount any path of this host for a volume
/// that is a bind in disguise: a recipe's volume must be here already, on a device.
fn check_volume(docker: &Docker, spec: &ContainerSpec, name: &str) -> Res<()> {
    match volume::look(docker, name)? {
        Some(have) if have.driver == "local" && have.options.contains_key("device") => {
            let bind = have.options.get("type").is_none_or(|kind| kind == "none")
                || have.options.get("o").is_some_and(|options| options.split(',').any(|word| word == "bind" || word == "rbind"));
            match bind {
                false => Ok(()),
                true => Err(Fault::new(
                    Code::PolicyRefused,
                    thing(&spec.name),
                    format!("its recipe mounts volume {name}, which is a path of this host"),
                    "give that volume another name on this host",
                )),
            }
        }
        Some(_) => Err(Fault::new(
            Code::NameTaken,
            thing(&spec.name),
            format!("volume {name} exists here and is not on a device"),
            "rename or remove that volume, after looking whether its data is needed",
        )),
        None => Err(Fault::new(
            Code::VolumeUnknown,
            thing(&spec.name),
            format!("volume {name} is not on this host, and dockerd would make an empty one"),
            "protect that volume too, or run the container without it",
        )),
    }
}

/// What was captured of a network of the container.
fn definition_of<'a>(spec: &'a ContainerSpec, network: &str) -> Option<&'a Value> {
    spec.inspect.get(network::KEY).and_then(|definitions| definitions.get(network))
}

/// Joins the networks that one create call could not.
fn connect(docker: &Docker, spec: &ContainerSpec, recipe: &Recipe, have: &Value) -> Res<bool> {
    let joined = &have["NetworkSettings"]["Networks"];
    let mut changed = false;
    for (network, endpoint) in recipe.networks.iter().filter(|(network, _)| joined.get(network).is_none()) {
        network::ensure(docker, network, definition_of(spec, network))?;
        let body = json!({"Container": spec.name, "EndpointConfig": endpoint});
        call(docker, &spec.name, &recipe.secrets, true, &format!("/networks/{network}/connect"), Some(&body))?;
        changed = true;
    }
    Ok(changed)
}

fn remove(docker: &Docker, name: &str) -> Res<()> {
    let options = RemoveContainerOptionsBuilder::default().v(true).build();
    docker
        .wait(&thing(name), call::QUICK, async { call::found(docker.client.remove_container(name, Some(options)).await) })
        .map(drop)
}

pub(super) fn start(docker: &Docker, container: &str) -> Res<bool> {
    let before = must(docker, container)?;
    if before.pointer("/State/Running") == Some(&Value::Bool(true)) {
        return Ok(false);
    }
    let thing = thing(container);
    let answer = docker
        .wait(&thing, call::START, async { Ok(docker.client.start_container(container, None::<StartContainerOptions>).await) })?;
    match answer {
        Ok(()) => Ok(true),
        Err(error @ Error::DockerResponseServerError { .. }) => {
            let fault = call::fault(&thing, &error, &recipe::secrets(&before));
            Err(Fault::new(Code::ContainerFailed, thing, fault.cause, "cure that on this host, then repeat the command"))
        }
        Err(error) => Err(call::fault(&thing, &error, &[])),
    }
}

pub(super) fn kill(docker: &Docker, container: &str) -> Res<bool> {
    let before = must(docker, container)?;
    if before.pointer("/State/Running") != Some(&Value::Bool(true)) {
        return Ok(false);
    }
    let options = KillContainerOptionsBuilder::default().signal("KILL").build();
    docker.wait(&thing(container), call::QUICK, async {
        match docker.client.kill_container(container, Some(options)).await {
            // Gone by itself meanwhile.
            Err(Error::DockerResponseServerError { status_code: 409, .. }) => Ok(false),
            other => other.map(|()| true),
        }
    })
}

/// The state out of an inspect, cleaned of the container's own secrets.
fn state_of(inspect: &Value) -> Running {
    let state = &inspect["State"];
    let health = text(state, "/Health/Status");
    let mut error = call::redact(text(state, "/Error"), &recipe::secrets(inspect));
    let running = state["Running"].as_bool().unwrap_or(false);
    let exit = state["ExitCode"].as_i64().unwrap_or(0);
    if error.is_empty() && !running && text(state, "/Status") == "exited" {
        let killed = if state["OOMKilled"].as_bool().unwrap_or(false) { ", out of memory" } else { "" };
        error = format!("it ended with exit code {exit}{killed}");
    }
    Running {
        running,
        pid: state["Pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0),
        health: Some(health).filter(|health| !health.is_empty() && *health != "none").map(str::to_string),
        error,
    }
}

pub(super) fn state(docker: &Docker, container: &str) -> Res<Running> {
    Ok(state_of(&must(docker, container)?))
}

pub(super) fn find_state(docker: &Docker, container: &str) -> Res<Option<Running>> {
    Ok(look(docker, container)?.as_ref().map(state_of))
}

/// Whether a process is there, as far as this one can see.
fn is_there(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

pub(super) fn await_health(docker: &Docker, container: &str, patience: Duration) -> Res<Duration> {
    let begun = Instant::now();
    let failed = |cause: String| {
        Err(Fault::new(Code::ContainerFailed, thing(container), cause, format!("see `docker logs {container}` on this host")))
    };
    loop {
        let state = state(docker, container)?;
        let waited = begun.elapsed();
        if !state.running {
            let words = if state.error.is_empty() { "it is not running".into() } else { state.error };
            return failed(words);
        }
        match state.health.as_deref() {
            Some("healthy") => return Ok(waited),
            Some("unhealthy") => return failed("its health check says unhealthy".into()),
            None if waited >= SETTLED && (is_there(state.pid) || waited >= HEARSAY) => return Ok(waited),
            _ => {}
        }
        if waited >= patience {
            return failed(format!("it runs, but was not healthy after {} s", patience.as_secs()));
        }
        std::thread::sleep(LOOK_EVERY.min(patience - waited));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_tells_the_cause_and_no_secret() {
        let inspect = json!({"Config": {"Env": ["PW=hunter2"]}, "State": {"Running": false, "Status": "exited", "ExitCode": 137,
            "OOMKilled": true, "Error": "", "Pid": 0}});
        assert_eq!(state_of(&inspect).error, "it ended with exit code 137, out of memory");
        let inspect =
            json!({"Config": {"Env": ["PW=hunter2"]}, "State": {"Error": "exec hunter2: no such file", "Status": "created"}});
        let state = state_of(&inspect);
        assert!(!state.error.contains("hunter2") && state.error.contains("no such file"));
        let inspect = json!({"State": {"Running": true, "Pid": 42, "Health": {"Status": "starting"}}});
        let want = Running { running: true, pid: 42, health: Some("starting".into()), error: String::new() };
        assert_eq!(state_of(&inspect), want);
    }
}
