//! The bandwidth cap: one token bucket for everything that this host sends.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How much unused allowance is kept, as a part of a second: a twentieth, so that a burst is short.
const BURST: Duration = Duration::from_millis(50);
/// The smallest piece that is sent at once under a cap, in bytes: one TLS record.
const PIECE_BYTES: u64 = 16 << 10;

/// The bucket alone, without a clock: it is told the time.
#[derive(Debug)]
struct Bucket {
    /// Bytes a second.
    rate: u64,
    /// What may be sent now, in billionths of a byte: at any rate a nanosecond earns a whole number of them, so nothing is rounded.
    allowance: u128,
    /// When the allowance was last brought up to date.
    at: Duration,
}

/// Billionths of a byte in a byte.
const BYTE: u128 = 1_000_000_000;

impl Bucket {
    fn new(rate: u64, now: Duration) -> Bucket {
        Bucket { rate: rate.max(1), allowance: 0, at: now }
    }

    /// How much of `wanted` may be sent now (at least one byte), or how long to wait before asking again.
    fn take(&mut self, wanted: u64, now: Duration) -> Result<u64, Duration> {
        let rate = u128::from(self.rate);
        // The most that is ever allowed at once.
        let depth = (rate * BURST.as_nanos()).max(u128::from(PIECE_BYTES) * BYTE);
        let earned = rate.saturating_mul(now.saturating_sub(self.at).as_nanos());
        self.allowance = self.allowance.saturating_add(earned).min(depth);
        self.at = self.at.max(now);
        let least = u128::from(wanted.min(PIECE_BYTES)) * BYTE;
        if self.allowance >= least {
            let granted = wanted.min(u64::try_from(self.allowance / BYTE).unwrap_or(u64::MAX));
            self.allowance -= u128::from(granted) * BYTE;
            return Ok(granted);
        }
        let wait = (least - self.allowance).div_ceil(rate);
        Err(Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)))
    }
}

/// The cap of one link, shared by all its connections.
pub(in crate::link) struct Pace {
    bucket: Mutex<Option<Bucket>>,
    changed: Notify,
    began: Instant,
}

impl Pace {
    /// No cap.
    pub fn new() -> Pace {
        Pace { bucket: Mutex::new(None), changed: Notify::new(), began: Instant::now() }
    }

    /// Another cap in bytes a second, or none. Who waits under the old one asks again at once.
    pub fn set(&self, rate: Option<u64>) {
        let now = self.began.elapsed();
        *self.lock() = rate.map(|rate| Bucket::new(rate, now));
        self.changed.notify_waiters();
    }

    /// Waits until a part of `wanted` bytes may be sent, and gives how many.
    pub async fn grant(&self, wanted: usize) -> usize {
        loop {
            // Made before the bucket is looked at: a change between the look and the wait is then not missed.
            let changed = self.changed.notified();
            let answer = match self.lock().as_mut() {
                None => return wanted,
                Some(bucket) => bucket.take(wanted as u64, self.began.elapsed()),
            };
            match answer {
                Ok(granted) => return usize::try_from(granted).unwrap_or(wanted),
                Err(wait) => tokio::select! { () = tokio::time::sleep(wait) => {}, () = changed => {} },
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Bucket>> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends as much as the bucket lets it in `lasts` of virtual time.
    fn sent(bucket: &mut Bucket, mut now: Duration, lasts: Duration, piece: u64) -> u64 {
        let (end, mut total) = (now + lasts, 0);
        while now < end {
            match bucket.take(piece, now) {
                Ok(granted) => {
                    assert!(granted > 0 && granted <= piece);
                    total += granted;
                }
                Err(wait) => {
                    assert!(!wait.is_zero());
                    now += wait;
                }
            }
        }
        total
    }

    proptest! {
        #[test]
        fn the_rate_is_kept_from_below_and_above(rate in 1u64..20_000_000_000, piece in 1u64..2_000_000, pieces in 1u64..2000) {
            let mut bucket = Bucket::new(rate, Duration::ZERO);
            // So long that about so many pieces fit: the steps of virtual time stay few at any rate.
            let lasts = Duration::from_nanos(u64::try_from(u128::from(piece * pieces) * BYTE / u128::from(rate)).unwrap());
            let allowed = u64::try_from(u128::from(rate) * lasts.as_nanos() / BYTE).unwrap();
            let total = sent(&mut bucket, Duration::ZERO, lasts, piece);
            prop_assert!(total <= allowed, "{total} of {allowed}");
            // Waits are whole nanoseconds, so each piece may come that much late; less than one piece waits at the end.
            let late = rate / 1_000_000_000 + 1;
            prop_assert!(total + PIECE_BYTES + late * (pieces + 1) >= allowed, "{total} of {allowed}");
        }
    }

    #[test]
    fn an_idle_hour_buys_no_more_than_a_short_burst() {
        let mut bucket = Bucket::new(1_000_000, Duration::ZERO);
        let hour = Duration::from_secs(3600);
        assert_eq!(bucket.take(u64::MAX, hour), Ok(50_000));
        assert!(bucket.take(u64::MAX, hour).is_err());
    }

    #[tokio::test]
    async fn a_cap_that_is_lifted_frees_who_waits_under_it() {
        let pace = std::sync::Arc::new(Pace::new());
        pace.set(Some(1));
        let waiting = tokio::spawn({
            let pace = pace.clone();
            async move { pace.grant(1 << 20).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        pace.set(None);
        assert_eq!(waiting.await.unwrap(), 1 << 20);
    }
}
