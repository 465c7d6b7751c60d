//! The JSON of the messages that are not bulk, in one spelling only.

use crate::format::message::{Landing, Message, Purpose, Standing};
use crate::model::{Digest, Fault, GroupId, ImagePin, Moment, Position, Res};
use serde::{Deserialize, Serialize};

/// Makes the form of each control message (its fields as JSON) and the three functions that speak for all of them.
macro_rules! control {
    ($($kind:literal $name:ident { $($(#[$with:meta])* $field:ident: $type:ty),* })*) => {
        $(
            #[derive(Serialize, Deserialize)]
            #[serde(deny_unknown_fields)]
            struct $name { $($(#[$with])* $field: $type),* }
        )*

        /// The kind of a control message. Panics on a bulk one, which has another encoder.
        pub fn kind(message: &Message) -> u16 {
            match message {
                $(Message::$name { .. } => $kind,)*
                bulk => unreachable!("{bulk:?} is not JSON"),
            }
        }

        /// Appends the payload of a control message.
        pub fn put(message: &Message, out: &mut Vec<u8>) {
            match message {
                $(Message::$name { $($field),* } => write(&$name { $($field: $field.clone()),* }, out),)*
                bulk => unreachable!("{bulk:?} is not JSON"),
            }
        }

        fn read(kind: u16, payload: &[u8]) -> serde_json::Result<Option<Message>> {
            Ok(match kind {
                $($kind => {
                    let $name { $($field),* } = serde_json::from_slice(payload)?;
                    Some(Message::$name { $($field),* })
                })*
                _ => None,
            })
        }
    };
}

control! {
    1 Hello { protocol: u16, #[serde(with = "name")] host: String, purpose: Purpose, group: GroupId, epoch: u64 }
    2 Welcome { protocol: u16, #[serde(with = "name")] host: String, standing: Standing, credit_bytes: u64 }
    4 Defined {}
    5 Begin { position: Position, parent: Position, parent_digest: Digest, landing: Landing, payload_max_bytes: u64 }
    7 Segment { number: u64 }
    8 SegmentDone { number: u64 }
    9 End { payload_bytes: u64, payload_digest: Digest, cut_at: Moment }
    10 Committed { position: Position, digest: Digest }
    11 Abort { #[serde(with = "words")] reason: String }
    12 Credit { bytes: u64 }
    13 DigestsWanted { volume: u16, start: u64, count: u64 }
    15 DigestsDone { volume: u16 }
    16 ImageOffer { #[serde(with = "pin_form")] pin: ImagePin, archive_bytes: u64 }
    17 ImageWanted { from_byte: Option<u64> }
    19 ImageEnd {}
    20 ImageReady {}
    21 Ping {}
    22 Pong {}
    23 Refused { #[serde(with = "fault_form")] fault: Fault }
}

fn write(form: &impl Serialize, out: &mut Vec<u8>) {
    // Writing to memory cannot fail, and no form has a map with odd keys: an error here is a bug of the forms above.
    serde_json::to_writer(&mut *out, form).expect("a control message is JSON");
}

/// Reads the payload of a control message. Error: `PROTOCOL_ERROR`.
pub fn get(kind: u16, payload: &[u8]) -> Res<Message> {
    let message = match read(kind, payload) {
        Ok(Some(message)) => message,
        Ok(None) => return Err(Fault::protocol(format!("there is no control message of kind {kind}"))),
        // serde's own words may quote the payload: only where it went wrong is repeated.
        Err(error) => {
            let (kind, column) = (kind, error.column());
            return Err(Fault::protocol(format!("a message of kind {kind} cannot be read at byte {column}")));
        }
    };
    // One spelling only: this also refuses words that are too long or carry control characters, which `put` would change.
    let mut again = Vec::with_capacity(payload.len());
    put(&message, &mut again);
    match again == payload {
        true => Ok(message),
        false => Err(Fault::protocol(format!("a message of kind {kind} is not spelled as this version spells it"))),
    }
}

/// A host's name.
mod name {
    use crate::model::check_name;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(name: &str, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(name)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
        let name = String::deserialize(d)?;
        check_name("host", &name).map_err(serde::de::Error::custom)?;
        Ok(name)
    }
}

/// Words for people: bounded, and without control characters, which could speak to an operator's terminal.
mod words {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Longest text, in bytes.
    pub const MAX_BYTES: usize = 2000;

    pub fn tidy(words: &str) -> String {
        let mut end = words.len().min(MAX_BYTES);
        while !words.is_char_boundary(end) {
            end -= 1;
        }
        // The space is one byte, as is every control character below U+0080; those above it are two. It never grows.
        words[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
    pub fn serialize<S: Serializer>(words: &str, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&tidy(words))
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
        String::deserialize(d)
    }
}

/// A fault, its words tidied.
mod fault_form {
    use crate::format::control::words;
    use crate::model::{Code, Fault};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Form {
        code: Code,
        #[serde(with = "words")]
        thing: String,
        #[serde(with = "words")]
        cause: String,
        #[serde(with = "words")]
        next: String,
    }

    pub fn serialize<S: Serializer>(fault: &Fault, s: S) -> Result<S::Ok, S::Error> {
        let Fault { code, thing, cause, next } = fault.clone();
        Form { code, thing, cause, next }.serialize(s)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Fault, D::Error> {
        let Form { code, thing, cause, next } = Form::deserialize(d)?;
        Ok(Fault { code, thing, cause, next })
    }
}

/// An image's pin: each digest is checked as it is read, so that a payload cannot become many more bytes of memory than it has.
mod pin_form {
    use crate::format::control::words;
    use crate::model::ImagePin;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// `sha256:` and 64 lower-case hexadecimal digits.
    #[derive(Serialize)]
    struct Sha256(String);

    impl<'de> Deserialize<'de> for Sha256 {
        fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            let text = String::deserialize(d)?;
            let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            match text.strip_prefix("sha256:").is_some_and(|digits| digits.len() == 64 && digits.bytes().all(hex)) {
                true => Ok(Sha256(text)),
                false => Err(D::Error::custom("not a sha256 digest")),
            }
        }
    }

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Form {
        config_digest: Sha256,
        diff_ids: Vec<Sha256>,
        #[serde(with = "words")]
        name: String,
    }

    pub fn serialize<S: Serializer>(pin: &ImagePin, s: S) -> Result<S::Ok, S::Error> {
        let diff_ids = pin.diff_ids.iter().cloned().map(Sha256).collect();
        Form { config_digest: Sha256(pin.config_digest.clone()), diff_ids, name: pin.name.clone() }.serialize(s)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<ImagePin, D::Error> {
        let form = Form::deserialize(d)?;
        let diff_ids = form.diff_ids.into_iter().map(|id| id.0).collect();
        Ok(ImagePin { config_digest: form.config_digest.0, diff_ids, name: form.name })
    }
}
