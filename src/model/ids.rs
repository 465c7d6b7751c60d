//! Identities that never change once made, and the names that people give to things.

use crate::model::fault::{Code, Fault, Res};
use serde::{Deserialize, Serialize};

/// A random 128-bit identity, written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

/// The identity of a volume on both hosts.
pub type VolumeId = Uuid;
/// The identity of a consistency group on both hosts.
pub type GroupId = Uuid;

impl std::fmt::Display for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for Uuid {
    type Err = Fault;
    fn from_str(text: &str) -> Res<Self> {
        let bad = || {
            Fault::new(
                Code::BadArgument,
                format!("identity {text:?}"),
                "it is not 32 hexadecimal digits",
                "use the identity as `doublure status --json` prints it",
            )
        };
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut bytes = [0; 16];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).map_err(|_| bad())?;
        }
        Ok(Uuid(bytes))
    }
}

impl Serialize for Uuid {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uuid {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Accepts a name of a host, group, volume or container: `[A-Za-z0-9][A-Za-z0-9_.-]{0,127}`.
///
/// Names are never used as paths; identities are.
pub fn check_name(kind: &str, name: &str) -> Res<()> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    let ok = name.len() <= 128 && name.bytes().all(fine) && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    match ok {
        true => Ok(()),
        false => Err(Fault::new(
            Code::BadArgument,
            format!("{kind} name {:?}", name.chars().take(140).collect::<String>()),
            "it may only have letters, digits, '_', '.' and '-', begin with a letter or digit, and be at most 128 long",
            "choose another name",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_or_worse_are_refused() {
        for bad in ["", ".", "..", "-x", "a/b", "a\0b", "a\nb", "é", "a b", &"x".repeat(129)] {
            assert!(check_name("volume", bad).is_err(), "{bad:?}");
        }
        for good in ["a", "pg-data_1.2", "0", &"x".repeat(128)] {
            assert!(check_name("volume", good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn an_identity_survives_text() {
        let id = Uuid(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse::<Uuid>().unwrap(), id);
        for bad in ["", "00", "zz112233445566778899aabbccddeeff", "00112233445566778899aabbccddeef+"] {
            assert!(bad.parse::<Uuid>().is_err());
        }
    }
}
