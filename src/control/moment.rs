//! Instants as people and JSON write them: RFC 3339 in UTC, with milliseconds.

use crate::model::Moment;

const DAY_MS: u64 = 86_400_000;

/// `2026-08-22T10:11:12.345Z`; `None` for the unknown moment (S9: unknown is not 1970).
pub fn rfc3339(moment: Moment) -> Option<String> {
    if moment == Moment(0) {
        return None;
    }
    let (days, ms) = (moment.0 / DAY_MS, moment.0 % DAY_MS);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second, milli) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
    Some(format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z"))
}

/// The moment that a text of [`rfc3339`] names (a fraction of one to nine digits, or none); `None` for any other text.
pub fn from_rfc3339(text: &str) -> Option<Moment> {
    let text = text.strip_suffix('Z')?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let (date, time) = whole.split_once('T')?;
    let three = |text: &str, by: char| -> Option<[u64; 3]> {
        let mut numbers = text.split(by).map(digits);
        let out = [numbers.next()??, numbers.next()??, numbers.next()??];
        numbers.next().is_none().then_some(out)
    };
    let ([year, month, day], [hour, minute, second]) = (three(date, '-')?, three(time, ':')?);
    if !(1970..=9999).contains(&year) || hour > 23 || minute > 59 || second > 59 || fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let days = days_from_civil(year, month, day);
    if month == 0 || civil_from_days(days) != (year, month, day) {
        return None; // the 31st of a month that has none
    }
    digits(fraction)?; // before it is cut: digits are one byte each
    let milli = digits(&format!("{fraction:0<3}")[..3])?;
    Some(Moment(days * DAY_MS + hour * 3_600_000 + minute * 60_000 + second * 1000 + milli))
}

/// A number of plain digits, at most nine of them.
fn digits(text: &str) -> Option<u64> {
    let plain = (1..=9).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// Year, month and day of a day since 1970-01-01, in the proleptic Gregorian calendar.
///
/// Years are counted from March, so that the leap day is the last of its year; 400 such years are one era of 146,097 days.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let from_0000_03_01 = days + 719_468;
    let (era, of_era) = (from_0000_03_01 / 146_097, from_0000_03_01 % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// The inverse, for years from 1970 on; months and days out of range give some other day.
fn days_from_civil(year: u64, month: u64, day: u64) -> u64 {
    let year = year - u64::from(month <= 2);
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day.max(1) - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_instants() {
        for (ms, text) in [
            (1, "1970-01-01T00:00:00.001Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_740_787_200_000, "2025-03-01T00:00:00.000Z"),
            (1_787_393_472_345, "2026-08-22T10:11:12.345Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Moment(ms)).as_deref(), Some(text));
            assert_eq!(from_rfc3339(text), Some(Moment(ms)));
        }
        assert_eq!(rfc3339(Moment(0)), None);
        assert_eq!(from_rfc3339("2026-08-22T10:11:12Z"), Some(Moment(1_787_393_472_000)));
        assert_eq!(from_rfc3339("2026-08-22T10:11:12.5Z"), Some(Moment(1_787_393_472_500)));
        assert_eq!(from_rfc3339("2026-08-22T10:11:12.345678901Z"), Some(Moment(1_787_393_472_345)));
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let lengths = |year: u64| {
            let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            [31, 28 + u64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
        };
        let mut days = 0;
        for year in 1970..2500 {
            for (month, length) in (1..).zip(lengths(year)) {
                for day in 1..=length {
                    assert_eq!(civil_from_days(days), (year, month, day));
                    assert_eq!(days_from_civil(year, month, day), days);
                    days += 1;
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_moment_survives_its_text(ms in 1u64..253_402_300_800_000) {
            prop_assert_eq!(from_rfc3339(&rfc3339(Moment(ms)).unwrap()), Some(Moment(ms)));
        }
        #[test]
        fn no_text_is_a_panic(text in "\\PC{0,40}", number in "[-0-9TZ:.+]{0,30}", any_ms: u64) {
            from_rfc3339(&text);
            from_rfc3339(&number);
            rfc3339(Moment(any_ms));
        }
    }

    #[test]
    fn what_is_no_such_text_is_refused() {
        for bad in [
            "",
            "Z",
            "unknown",
            "2026-08-22",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-01-00T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:60Z",
            "1969-12-31T23:59:59Z",
            "2026-01-01T00:00:00+01:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00.xZ",
            "2026-01-01T00:00:00.12xZ",
            "+026-01-01T00:00:00Z",
            "2026-01-01T00:00:00.é0Z",
        ] {
            assert_eq!(from_rfc3339(bad), None, "{bad}");
        }
    }
}
