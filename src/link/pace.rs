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
    /// Bytes that may be sent now.
    allowance: u64,
    /// When the allowance was last brought up to date.
    at: Duration,
}

impl Bucket {
    fn new(rate: u64, now: Duration) -> Bucket {
        Bucket { rate: rate.max(1), allowance: 0, at: now }
    }

    /// How much of `wanted` may be sent now (at least one byte), or how long to wait before asking again.
    fn take(&mut self, wanted: u64, now: Duration) -> Result<u64, Duration> {
        let depth = self.depth();
        let passed = now.saturating_sub(self.at);
        let earned = u64::try_from(u128::from(self.rate) * passed.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX);
        if earned > 0 {
            // Only the time that whole bytes were earned in is used up; the rest counts the next time.
            let used = u64::try_from(u128::from(earned) * 1_000_000_000 / u128::from(self.rate)).unwrap_or(u64::MAX);
            self.at = if self.allowance.saturating_add(earned) >= depth { now } else { self.at + Duration::from_nanos(used) };
            self.allowance = self.allowance.saturating_add(earned).min(depth);
        }
        let least = wanted.min(PIECE_BYTES);
        if self.allowance >= least {
            let granted = wanted.min(self.allowance);
            self.allowance -= granted;
            return Ok(granted);
        }
        let missing = u128::from(least - self.allowance);
        Err(Duration::from_nanos(u64::try_from(missing * 1_000_000_000 / u128::from(self.rate) + 1).unwrap_or(u64::MAX)))
    }

    /// The most that is ever allowed at once.
    fn depth(&self) -> u64 {
        let burst = u128::from(self.rate) * BURST.as_nanos() / 1_000_000_000;
        u64::try_from(burst).unwrap_or(u64::MAX).max(PIECE_BYTES)
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
        fn the_rate_is_kept_from_below_and_above(rate in 1u64..20_000_000_000, piece in 1u64..2_000_000, seconds in 1u64..100) {
            let mut bucket = Bucket::new(rate, Duration::ZERO);
            // Steps are counted, not slept: a fast rate with small pieces is checked over a shorter time.
            let lasts = if rate / piece > 100_000 { Duration::from_micros(seconds * 100) } else { Duration::from_secs(seconds) };
            let allowed = u64::try_from(u128::from(rate) * lasts.as_nanos() / 1_000_000_000).unwrap();
            let total = sent(&mut bucket, Duration::ZERO, lasts, piece);
            prop_assert!(total <= allowed, "{total} of {allowed}");
            prop_assert!(total + 2 * PIECE_BYTES + allowed / 1000 >= allowed, "{total} of {allowed}");
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
