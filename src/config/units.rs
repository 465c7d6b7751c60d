//! Sizes and durations as people write them.

use crate::model::{Code, Fault, Res};
use std::time::Duration;

const SIZE_NEXT: &str = "write a whole number with a binary unit, such as 512 MiB, 2G or 65536";
const DURATION_NEXT: &str = "write a whole number with a unit, such as 250ms, 1s, 2m or 1h";

/// Parses a size such as `2G`, `512 MiB`, `64k`, `1048576`: K, M, G and T are binary, `iB` or `B` may follow. Gives bytes.
///
/// Errors: `BAD_ARGUMENT` for anything else and for what does not fit in 64 bits.
pub fn parse_size(text: &str) -> Res<u64> {
    let bad = |cause: &str| Fault::new(Code::BadArgument, format!("size {:?}", shown(text)), cause, SIZE_NEXT);
    let (number, unit) = split(text).ok_or_else(|| bad("it does not begin with a whole number"))?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad("its unit is not one of B, K, M, G and T")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| bad("it is too large"))
}

/// Parses a duration such as `250ms`, `1s`, `2m`, `1h`. A number without a unit is refused: nobody knows what it means.
///
/// Errors: `BAD_ARGUMENT`.
pub fn parse_duration(text: &str) -> Res<Duration> {
    let bad = |cause: &str| Fault::new(Code::BadArgument, format!("duration {:?}", shown(text)), cause, DURATION_NEXT);
    let (number, unit) = split(text).ok_or_else(|| bad("it does not begin with a whole number"))?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "" => return Err(bad("it has no unit")),
        _ => return Err(bad("its unit is not one of ms, s, m and h")),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(|| bad("it is too large"))
}

/// The number in front and the unit behind, blanks around both dropped.
fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start()))
}

/// The beginning of what was written, for an error; what a person typed may be a whole novel.
fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}
