//! A storm of stamped writes against devices and files, and a checker that knows which images of them are legal.
//!
//! ```ignore
//! let storm = Storm::start(7, targets, Options::default());
//! let mut checker = storm.checker();
//! let t_low = storm.now();
//! // ... a cut begins, ends ...
//! let t_high = storm.now();
//! checker.apply(volume, offset, &bytes);            // the generation, in any order of disjoint pieces
//! checker.check(t_low, t_high)?;
//! let summary = storm.stop();                       // all is synced
//! checker.check(now, now)?; checker.final_equal(0, &device)?;
//! ```
//!
//! On a mounted file system the targets are files of it, the image of such a volume is the file as found on the mounted
//! replica (`Checker::load`), and a write counts as there only once a sync has returned.
// Each test uses its part.
#![allow(dead_code, unused_imports)]

pub mod checker;
pub mod journal;
pub mod stamp;
pub mod writer;

pub use checker::{Checked, Checker, Violation};
pub use journal::{End, Journal, Kind, Op};
pub use stamp::{Follows, Found, Pool, SECTOR, Stamp};
pub use writer::{Mode, Options, Storm, Summary, Target};

/// Random numbers that a seed repeats.
pub struct Dice(u64);

impl Dice {
    /// Seeded.
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }
    /// 64 random bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// Below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.word() % end
    }
    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}
