// SPDX-License-Identifier: GPL-2.0
//
// The dirty bitmap: tiny programs that set one bit per 4 KiB block that a bio changes.
//
// Why four programs. A program that is still running on a CPU is skipped when its tracepoint fires there again (the
// kernel counts it in `recursion_misses`); on kernels with preemptible tracepoint programs that is common. So each
// body is loaded twice: a bio is lost to its kind only if every copy of the kind missed it.
//
// Why at submit and at completion. A write may be in flight while the phase flips and its block is read. Its submit
// bit then lies in the taken half, and the reader may have seen the old bytes. The completion sets the bit once more,
// in the half that is active by then, so the next round reads the block again: no drain is needed, not at a flip and
// not when the programs are attached.
//
// Why the phase is read once. The half is chosen by one load of one word. After the store of a new phase and one RCU
// grace period no program is left that chose the old half.
//
// Layout of a volume's map (words of 64 bits), the same in halves.rs:
//   [half 0: words] [half 1: words] [held: words] [half 0: summary_words] [half 1: ...] [held: ...]
// `held` belongs to user space alone: what earlier flips took and nobody has acknowledged yet.
// A summary bit stands for a page of 512 words; it is set before the first bit of its page, never after.

#include "shared.bpf.h"

enum { PROGRAMS = 4, HALVES = 2, REGIONS = 3, NOTE_BYTES = 256 };
const volatile struct {
	u32 plant; // a fault planted by a test; 0 otherwise
} fault SEC(".rodata.fault") = { 0 };
// One per program and volume, per CPU: a program is never re-entered on a CPU, so plain adds are exact.
struct counters {
	u64 sectors; // changed, 512 bytes each
	u64 unknown; // operations whose range is not known
	u64 outside; // ranges that could not be recorded
	u64 stale; // operations on another disk under this number
	u64 untracked; // writes that found no place in the in-flight table
};
struct note {
	unsigned char bytes[NOTE_BYTES];
};
struct bits_map {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, F_MMAPABLE | F_INNER_MAP);
	__type(key, u32);
	__type(value, u64);
};

struct {
	__uint(type, MAP_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_VOLUMES + 1); // the last one is updated only to make the kernel wait a grace period
	__type(key, u32);
	__array(values, struct bits_map);
} bits SEC(".maps");

struct {
	__uint(type, MAP_PERCPU_ARRAY);
	__uint(max_entries, MAX_VOLUMES * PROGRAMS);
	__type(key, u32);
	__type(value, struct counters);
} counters SEC(".maps");

// What user space must remember exactly as long as the bits live; no program reads them.
struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct note);
} host_note SEC(".maps");

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, MAX_VOLUMES);
	__type(key, u32);
	__type(value, struct note);
} group_notes SEC(".maps"), volume_notes SEC(".maps");

struct walk {
	u64 bits_at;
	u64 summary_at;
	u64 first;
	u64 last;
	u32 slot;
	u32 failed;
};

// Sets the bits of [first, last] that lie in the index-th word touched. The bit is tested before the locked OR: the
// address depends on the phase that was read, so the test cannot see a word as it was before the half became active.
static long mark_word(u32 index, struct walk *walk)
{
	u64 word = (walk->first >> 6) + index;
	u64 page = word >> 9;
	u64 mask = ~0ULL, summary = 1ULL << (page & 63);
	u32 slot = walk->slot, at = walk->summary_at + (page >> 6);
	void *map = bpf_map_lookup_elem(&bits, &slot);
	u64 *found;

	if (word == walk->first >> 6)
		mask <<= walk->first & 63;
	if (word == walk->last >> 6)
		mask &= ~0ULL >> (63 - (walk->last & 63));
	if (!map)
		goto failed;
	found = bpf_map_lookup_elem(map, &at);
	if (!found)
		goto failed;
	if (!(*found & summary))
		__sync_fetch_and_or(found, summary);
	at = walk->bits_at + word;
	found = bpf_map_lookup_elem(map, &at);
	if (!found)
		goto failed;
	if ((*found & mask) != mask)
		__sync_fetch_and_or(found, mask);
	return 0;
failed:
	walk->failed = 1;
	return 1;
}

// Sets the bits of blocks [first, last]. A global function: verified once, apart from its callers. 0 = all set.
__attribute__((noinline)) int mark_blocks(u32 slot, u64 bits_at, u64 summary_at, u64 first, u64 last)
{
	struct walk walk = {
		.bits_at = bits_at, .summary_at = summary_at, .first = first, .last = last, .slot = slot,
	};
	u64 words = (last >> 6) - (first >> 6) + 1;

	if (words == 1) {
		mark_word(0, &walk);
		return walk.failed;
	}
	// A bio holds less than 4 GiB: 16,385 words. bpf_loop() takes eight million.
	if (words > 1 << 20 || bpf_loop(words, mark_word, &walk, 0) != words)
		return 1;
	return walk.failed;
}

static inline_always struct counters *counters_of(struct volume *volume, u32 program)
{
	u32 at = volume->slot * PROGRAMS + program;

	return bpf_map_lookup_elem(&counters, &at);
}

static inline_always int mark_range(struct volume *volume, u32 half, u64 first, u64 last)
{
	return mark_blocks(volume->slot, (u64)half * volume->words,
			   (u64)REGIONS * volume->words + (u64)half * volume->summary_words, first, last);
}

#include "flight.bpf.h"

// One range, rounded outwards to blocks, into the half `half`.
static inline_always void mark_sectors(struct volume *volume, struct counters *count, u32 half, u64 sector, u64 bytes)
{
	u64 sectors = (bytes + 511) >> 9, first = sector >> 3, last = (sector + sectors - 1) >> 3;
	u64 blocks = volume->blocks;

	if (!sectors)
		return;
	count->sectors += sectors;
	if (first >= blocks || last < first) {
		count->outside++;
		return;
	}
	if (last >= blocks) {
		count->outside++;
		last = blocks - 1;
	}
	if (mark_range(volume, half, first, last))
		count->outside++;
}

// The half to write to.
static inline_always u32 active_half(struct volume *volume)
{
	return (u32)phase_of(volume) % HALVES;
}

static inline_always int submitted(struct bio *bio, u32 program)
{
	u32 op = bio->bi_opf & OP_MASK;
	struct gendisk *disk;
	struct volume *volume;
	struct counters *count;

	if (!(op & 1))
		return 0;
	// The disk, not the device: a bio on a partition names the partition but carries the whole disk's sector.
	disk = bio->bi_bdev->bd_disk;
	volume = find(disk);
	if (!volume)
		return 0;
	count = counters_of(volume, program);
	if (!count)
		return 0;
	if (disk->diskseq != volume->diskseq) {
		count->stale++;
		return 0;
	}
	if (!known(op))
		count->unknown++;
	mark_sectors(volume, count, active_half(volume), bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
	if (fault.plant == PLANT_UNSEEN_AND_NOT_ENTERED && bio->bi_iter.bi_sector * 0x9e3779b97f4a7c15ULL >> 63) {
		if (program == 0)
			count->untracked++;
		return 0;
	}
	// After the bit: whoever does not find a write in the table finds its bit.
	if (program == 0 && bio->bi_iter.bi_size &&
	    flight_begin(number_of(bio), volume, (u32)disk->major << 20 | (u32)disk->first_minor, bio->bi_iter.bi_sector,
			 bio->bi_iter.bi_size))
		count->untracked++;
	return 0;
}

static inline_always int completed(struct request *rq, u32 bytes, u32 program)
{
	u32 op = rq->cmd_flags & OP_MASK, half;
	struct gendisk *disk;
	struct volume *volume;
	struct counters *count;
	struct bio *bio;
	int i;

	if (!(op & 1))
		return 0;
	disk = rq->q->disk;
	volume = find(disk);
	if (!volume)
		return 0;
	count = counters_of(volume, program);
	if (!count)
		return 0;
	if (disk->diskseq != volume->diskseq) {
		count->stale++;
		return 0;
	}
	if (unseen(fault.plant, rq->__sector))
		return 0;
	if (!known(op))
		count->unknown++;
	half = active_half(volume);
	bio = rq->bio;
	if (op != OP_DISCARD || !bio || !bio->bi_next) {
		// Data and flush sequences complete twice, the second time with no bytes; partial completions name theirs.
		if (fault.plant == PLANT_SUBMIT_ONLY)
			count->sectors += (bytes + 511) >> 9;
		else
			mark_sectors(volume, count, half, rq->__sector, bytes);
		goto ended;
	}
	// Devices that take many ranges in one discard merge bios that do not touch: each has its own range.
	for (i = 0; i < 256 && bio; i++) {
		mark_sectors(volume, count, half, bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
		bio = bio->bi_next;
	}
	if (bio)
		count->unknown++;
ended:
	// After the bit, for the same reason.
	if (program == 2 && bytes)
		flights_end(rq, bytes);
	return 0;
}

#define COPY(letter, at)                                                         \
	SEC("tp_btf/block_bio_queue") int submit_##letter(u64 *ctx)              \
	{                                                                        \
		return submitted((struct bio *)ctx[0], at);                      \
	}                                                                        \
	SEC("tp_btf/block_rq_complete") int complete_##letter(u64 *ctx)          \
	{                                                                        \
		return completed((struct request *)ctx[0], (u32)ctx[2], 2 + at); \
	}

COPY(a, 0)
COPY(b, 1)

// A bio that ended without having become a request: refused (RWF_NOWAIT), or in error before it reached the driver.
SEC("tp_btf/block_bio_complete") int drop(u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[1];

	// Of another disk it was never entered: what stands under its address is an earlier life of it, whose completion nobody saw.
	if (bio->bi_opf & 1 && find(bio->bi_bdev->bd_disk))
		flight_progress(number_of(bio), ~0U);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
