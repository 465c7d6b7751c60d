//! Whether an image is a legal state of the storm: a prefix, sector by sector.
//!
//! The rule. Let T be the latest of: the lower bound, and the submission of any write of which a sector is there. Every write
//! that had ended before T must be there, or be overwritten by a later one that is allowed to be there. For writes of one
//! sector never overlap in time (writers have ranges of their own), their sequence is their order.
//!
//! The cost of a check is that of what changed and of what newly must be there; nothing is looked at twice.

use super::journal::{End, Journal, Kind, Op};
use super::stamp::{Follows, Found, Pool, SECTOR};
use memmap2::MmapMut;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Codes of a sector's content: a sequence + 1, or one of these.
const ZERO: u32 = 0;
/// As it was before the storm, and not zero.
const BEFORE: u32 = u32::MAX - 1;
const GARBAGE: u32 = u32::MAX;
/// No write must be there.
const NOTHING: u32 = 0;

/// An image that no crash could have left.
#[derive(Debug)]
pub struct Violation(pub String);
impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Violation {}

/// What a check looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Sectors whose content changed.
    pub changed: u64,
    /// Writes that newly had to be there.
    pub required: u64,
    /// Sectors with a content that is only legal because it is undefined.
    pub undefined: u64,
    /// Stamps whose dependency was looked up.
    pub links: u64,
}

struct Volume {
    replica: MmapMut,
    /// What each sector holds.
    holds: Vec<u32>,
    /// The last write of each sector that must be there.
    needs: Vec<u32>,
    /// The check in which a sector was last read.
    marks: Vec<u32>,
    /// Ranges of sectors that changed since the last check.
    changed: Vec<(u64, u64)>,
    /// Sectors that were not zero before the storm.
    based: HashSet<u64>,
    /// Noted writes that do not have to be there yet, by sequence.
    pending: BTreeMap<u32, (u64, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    op: Op,
    end: Option<End>,
}

/// The checker of one image.
pub struct Checker {
    journal: Arc<Journal>,
    pool: Pool,
    volumes: BTreeMap<u32, Volume>,
    known: Vec<Option<Known>>,
    /// Ended, not required yet, by time.
    ended: BinaryHeap<Reverse<(u64, u32)>>,
    cursors: Vec<(usize, usize)>,
    /// The latest submission of a write that is there.
    latest: u64,
    checks: u32,
    report: Checked,
}

impl Checker {
    /// A checker of volumes (number, bytes) that are all zero, as their replicas are.
    pub fn new(journal: Arc<Journal>, volumes: &[(u32, u64)]) -> Checker {
        let volume = |bytes: u64| {
            assert!(bytes > 0 && bytes.is_multiple_of(SECTOR as u64), "a volume is whole sectors");
            let sectors = (bytes / SECTOR as u64) as usize;
            Volume {
                replica: MmapMut::map_anon(bytes as usize).expect("memory for a replica"),
                holds: vec![ZERO; sectors],
                needs: vec![NOTHING; sectors],
                marks: vec![0; sectors],
                changed: Vec::new(),
                based: HashSet::new(),
                pending: BTreeMap::new(),
            }
        };
        Checker {
            pool: Pool::new(journal.seed),
            volumes: volumes.iter().map(|(number, bytes)| (*number, volume(*bytes))).collect(),
            known: Vec::new(),
            ended: BinaryHeap::new(),
            cursors: vec![(0, 0); journal.threads()],
            latest: 0,
            checks: 0,
            report: Checked::default(),
            journal,
        }
    }

    /// The image as it was before the storm, where it was not zero: whole sectors, before the first `apply`.
    pub fn base(&mut self, volume: u32, offset: u64, bytes: &[u8]) {
        assert!(self.checks == 0 && offset.is_multiple_of(SECTOR as u64), "the base comes first, in whole sectors");
        let volume = self.volume(volume);
        volume.replica[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        for (n, sector) in bytes.chunks(SECTOR).enumerate() {
            if sector.iter().any(|byte| *byte != 0) {
                volume.holds[offset as usize / SECTOR + n] = BEFORE;
                volume.based.insert(offset / SECTOR as u64 + n as u64);
            }
        }
    }

    fn volume(&mut self, number: u32) -> &mut Volume {
        self.volumes.get_mut(&number).expect("a volume of this checker")
    }

    /// A piece of a generation. Offsets are bytes and need not be whole sectors.
    pub fn apply(&mut self, volume: u32, offset: u64, bytes: &[u8]) {
        let volume = self.volume(volume);
        let mut at = offset as usize;
        let mut rest = bytes;
        // What does not change is not looked at: reads of whole blocks bring many sectors along.
        while !rest.is_empty() {
            let (piece, others) = rest.split_at(rest.len().min(SECTOR - at % SECTOR));
            if volume.replica[at..at + piece.len()] != *piece {
                volume.replica[at..at + piece.len()].copy_from_slice(piece);
                volume.touch((at / SECTOR) as u64, 1);
            }
            at += piece.len();
            rest = others;
        }
    }

    /// A range of zeroes of a generation.
    pub fn apply_zero(&mut self, volume: u32, offset: u64, bytes: u64) {
        let volume = self.volume(volume);
        let range = offset as usize..(offset + bytes) as usize;
        volume.touch((range.start / SECTOR) as u64, (range.end.div_ceil(SECTOR) - range.start / SECTOR) as u64);
        volume.replica[range].fill(0);
    }

    /// The whole image of a volume from a file, which holds it from byte `from` on (as much of it as there is).
    pub fn load(&mut self, volume: u32, path: &Path, from: u64) -> std::io::Result<()> {
        let file = File::open(path)?;
        let length = self.volume(volume).replica.len() as u64;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < length {
            let want = buffer.len().min((length - at) as usize);
            let got = file.read_at(&mut buffer[..want], from + at)?;
            if got == 0 {
                break;
            }
            self.apply(volume, at, &buffer[..got]);
            at += got as u64;
        }
        Ok(())
    }

    /// The replica's bytes of a volume.
    pub fn replica(&self, volume: u32) -> &[u8] {
        &self.volumes[&volume].replica
    }

    fn read_journal(&mut self) {
        for thread in 0..self.journal.threads() {
            let shard = self.journal.shard(thread);
            let (ops, ends) = &mut self.cursors[thread];
            for op in &shard.ops[*ops..] {
                let at = op.seq as usize;
                if self.known.len() <= at {
                    self.known.resize(at + 1, None);
                }
                self.known[at] = Some(Known { op: *op, end: None });
                if let Some(volume) = self.volumes.get_mut(&op.volume) {
                    volume.pending.insert(op.seq as u32, (op.first, op.sectors));
                }
            }
            for (seq, end, when) in &shard.ends[*ends..] {
                let known = self.known[*seq as usize].as_mut().expect("an end of a noted write");
                known.end = Some(*end);
                if self.volumes.contains_key(&known.op.volume) {
                    self.ended.push(Reverse((*when, *seq as u32)));
                }
            }
            (*ops, *ends) = (shard.ops.len(), shard.ends.len());
        }
    }

    /// Judges the image after a generation. `t_low`: all that had ended before it must be there; `t_high`: nothing that was
    /// submitted after it may be there. Both are times of [`Journal::now`]. Errors: the first violation found.
    pub fn check(&mut self, t_low: u64, t_high: u64) -> Result<Checked, Violation> {
        self.checks += 1;
        self.report = Checked::default();
        self.read_journal();
        let mut suspects = Vec::new();
        let mut links: Vec<(u32, u64, u64, Follows)> = Vec::new();
        let numbers: Vec<u32> = self.volumes.keys().copied().collect();
        for number in numbers {
            self.read_changes(number, t_high, &mut suspects, &mut links)?;
        }
        // What must be there may, by what is there in spite of it, make more have to be there: until nothing is added.
        let mut judged = 0;
        loop {
            self.require(self.latest.max(t_low), &mut suspects);
            if judged == suspects.len() {
                break;
            }
            for (number, first, count) in &suspects[judged..] {
                for sector in *first..first + count {
                    self.judge(*number, sector, t_high)?;
                }
            }
            judged = suspects.len();
        }
        for (number, sector, seq, follows) in links {
            self.follow(number, sector, seq, follows)?;
        }
        Ok(self.report)
    }

    /// Reads each changed sector once.
    fn read_changes(
        &mut self,
        number: u32,
        t_high: u64,
        suspects: &mut Vec<(u32, u64, u64)>,
        links: &mut Vec<(u32, u64, u64, Follows)>,
    ) -> Result<(), Violation> {
        let checks = self.checks;
        let volume = self.volumes.get_mut(&number).unwrap();
        let changed = std::mem::take(&mut volume.changed);
        let mut linked = u64::MAX;
        for sector in changed.into_iter().flat_map(|(first, count)| first..first + count) {
            let at = sector as usize;
            if std::mem::replace(&mut volume.marks[at], checks) == checks {
                continue;
            }
            self.report.changed += 1;
            volume.holds[at] = match self.pool.read(&volume.replica[at * SECTOR..][..SECTOR]) {
                Found::Zero => ZERO,
                Found::Garbage => GARBAGE,
                Found::Stamp(stamp) => {
                    let place = format!("volume {number} sector {sector}");
                    if (stamp.volume, stamp.sector) != (number, sector) {
                        let (v, s) = (stamp.volume, stamp.sector);
                        return Err(Violation(format!("{place} holds what belongs to volume {v} sector {s}")));
                    }
                    let Some(Known { op, .. }) = self.known.get(stamp.seq as usize).copied().flatten() else {
                        return Err(Violation(format!("{place} holds write {}, which nobody made", stamp.seq)));
                    };
                    if op.volume != number || !(op.first..op.first + op.sectors).contains(&sector) {
                        return Err(Violation(format!("{place} holds write {}, which was elsewhere", stamp.seq)));
                    }
                    if op.submitted > t_high {
                        let late = op.submitted - t_high;
                        let seq = stamp.seq;
                        return Err(Violation(format!("{place} holds write {seq}, submitted {late} ns after the cut")));
                    }
                    self.latest = self.latest.max(op.submitted);
                    if let Some(follows) = stamp.follows.filter(|_| linked != stamp.seq) {
                        linked = stamp.seq;
                        links.push((number, sector, stamp.seq, follows));
                    }
                    stamp.seq as u32 + 1
                }
            };
            match suspects.last_mut() {
                Some((n, first, count)) if *n == number && *first + *count == sector => *count += 1,
                _ => suspects.push((number, sector, 1)),
            }
        }
        Ok(())
    }

    /// From now on all that had ended before `time` must be there.
    fn require(&mut self, time: u64, suspects: &mut Vec<(u32, u64, u64)>) {
        while let Some(Reverse((when, seq))) = self.ended.peek().copied() {
            if when >= time {
                break;
            }
            self.ended.pop();
            self.report.required += 1;
            let op = self.known[seq as usize].unwrap().op;
            let volume = self.volumes.get_mut(&op.volume).unwrap();
            volume.pending.remove(&seq);
            for need in &mut volume.needs[op.first as usize..(op.first + op.sectors) as usize] {
                *need = (*need).max(seq + 1);
            }
            suspects.push((op.volume, op.first, op.sectors));
        }
    }

    /// Whether anything is legal where this write is the last one that must be there.
    fn leaves_anything(&self, code: u32) -> bool {
        let known = code.checked_sub(1).and_then(|seq| self.known[seq as usize]);
        known.is_some_and(|k| matches!(k.op.kind, Kind::Discard | Kind::Clash) || k.end == Some(End::Failed))
    }

    fn judge(&mut self, number: u32, sector: u64, t_high: u64) -> Result<(), Violation> {
        let volume = &self.volumes[&number];
        let (holds, needs) = (volume.holds[sector as usize], volume.needs[sector as usize]);
        let legal = match holds {
            ZERO => needs == NOTHING && !volume.based.contains(&sector),
            BEFORE => needs == NOTHING,
            GARBAGE => false,
            _ => holds >= needs,
        };
        if legal {
            return Ok(());
        }
        if self.leaves_anything(needs) {
            self.report.undefined += 1;
            return Ok(());
        }
        let needed_kind = needs.checked_sub(1).map(|seq| self.known[seq as usize].unwrap().op.kind);
        if holds == ZERO && needed_kind == Some(Kind::Zero) {
            return Ok(());
        }
        // Not what must be there: by a write that was in flight?
        let mut zeroed_at = None;
        for (seq, (first, count)) in &volume.pending {
            if *seq < needs || !(*first..first + count).contains(&sector) {
                continue;
            }
            let Known { op, end } = self.known[*seq as usize].unwrap();
            if op.submitted > t_high {
                continue;
            }
            let anything = matches!(op.kind, Kind::Discard | Kind::Clash) || end == Some(End::Failed);
            if anything || (holds == GARBAGE && op.kind == Kind::Cached) {
                self.report.undefined += 1;
                return Ok(());
            }
            if holds == ZERO && op.kind == Kind::Zero {
                zeroed_at = zeroed_at.or(Some(op.submitted));
            }
        }
        if let Some(submitted) = zeroed_at {
            self.latest = self.latest.max(submitted);
            return Ok(());
        }
        let say = |code: u32| match code {
            ZERO => "zeroes".to_string(),
            BEFORE => "what it held before the storm".to_string(),
            GARBAGE => "a torn or foreign sector".to_string(),
            _ => format!("{:?}", self.known[code as usize - 1].unwrap()),
        };
        let must = if needs == NOTHING { "what it held before the storm".to_string() } else { say(needs) };
        Err(Violation(format!("volume {number} sector {sector} holds {}, but must hold {must}", say(holds))))
    }

    /// The dependency that the sector itself names, without any clock.
    fn follow(&mut self, number: u32, sector: u64, seq: u64, follows: Follows) -> Result<(), Violation> {
        let Some(volume) = self.volumes.get(&follows.volume) else { return Ok(()) };
        self.report.links += 1;
        let (holds, needs) = (volume.holds[follows.sector as usize], volume.needs[follows.sector as usize]);
        // What is not a stamp was judged already: it is legal only if something later made it.
        let stamped = ![ZERO, BEFORE, GARBAGE].contains(&holds);
        let by_stamp = stamped && u64::from(holds) > follows.seq;
        let judged = !stamped && u64::from(needs) > follows.seq;
        if by_stamp || judged || self.leaves_anything(needs) {
            return Ok(());
        }
        let (v, s, f) = (follows.volume, follows.sector, follows.seq);
        Err(Violation(format!(
            "volume {number} sector {sector} holds write {seq}, which followed write {f}; volume {v} sector {s} lacks it"
        )))
    }

    /// Compares a device with the replica, both at rest and after a last `check`. Returns how many sectors differ that have no
    /// defined content. Errors: the first difference elsewhere.
    pub fn final_equal(&mut self, volume: u32, device: &Path) -> Result<u64, Violation> {
        self.read_journal();
        let file = File::open(device).map_err(|e| Violation(format!("{}: {e}", device.display())))?;
        let length = self.volumes[&volume].replica.len();
        let mut buffer = vec![0; 1 << 20];
        let mut undefined = 0;
        for at in (0..length).step_by(buffer.len()) {
            let part = &mut buffer[..(1usize << 20).min(length - at)];
            file.read_exact_at(part, at as u64).map_err(|e| Violation(format!("{}: {e}", device.display())))?;
            if *part == self.volumes[&volume].replica[at..at + part.len()] {
                continue;
            }
            for (n, sector) in part.chunks(SECTOR).enumerate() {
                let address = (at / SECTOR + n) as u64;
                let model = &self.volumes[&volume];
                if *sector == model.replica[address as usize * SECTOR..][..SECTOR] {
                    continue;
                }
                let anything = |seq: u32| self.leaves_anything(seq + 1);
                let covers =
                    |(seq, (first, count)): (&u32, &(u64, u64))| (*first..first + count).contains(&address) && anything(*seq);
                if !self.leaves_anything(model.needs[address as usize]) && !model.pending.iter().any(covers) {
                    let found = self.pool.read(sector);
                    let holds = self.pool.read(&model.replica[address as usize * SECTOR..][..SECTOR]);
                    return Err(Violation(format!(
                        "at the end volume {volume} sector {address} is {found:?} on {}, {holds:?} on the replica",
                        device.display()
                    )));
                }
                undefined += 1;
            }
        }
        Ok(undefined)
    }
}

impl Volume {
    fn touch(&mut self, first: u64, count: u64) {
        assert!((first + count) as usize <= self.holds.len(), "a record beyond the volume's end");
        match self.changed.last_mut() {
            Some((start, length)) if *start + *length == first => *length += count,
            _ => self.changed.push((first, count)),
        }
    }
}
