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
//
// A small volume has a bit of `words` for each block. A large one (`sparse`) has a bit for each range of LEAF_BLOCKS blocks, the
// coarse level, and the blocks' bits in leaves, which are made when they are needed: one hash map for all volumes, from slot, region
// and number of the range to the leaf. The volume's own map goes on with [half 0: words] [half 1: words] [held: words]: ranges all of whose blocks are
// dirty, because one write covered them or because no leaf could be made (doubt means dirty).
// The summary bit is set before the coarse bit, the coarse bit before the leaf is made: a leaf that is there needs no look at
// either. Leaves of the active half are made and never removed; user space removes those of the others, which no program uses.

#include "shared.bpf.h"

enum { UPDATE_NOEXIST = 1 };

static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static u32 (*bpf_get_smp_processor_id)(void) = (void *)8;
static long (*bpf_for_each_map_elem)(void *map, void *callback, void *ctx, u64 flags) = (void *)164;

enum { PROGRAMS = 4, HALVES = 2, REGIONS = 3, NOTE_BYTES = 256 };
const volatile struct {
	u32 plant; // a fault planted by a test; 0 otherwise
} fault SEC(".rodata.fault") = { 0 };
// A leaf with the map's own 64 bytes (element header 48, key 8, the allocator's link 8) fills 512 bytes of memory exactly.
enum { LEAF_WORDS = 56, LEAF_BLOCKS = LEAF_WORDS * 64, INBOX_LEAVES = 128 };

struct leaf {
	u64 words[LEAF_WORDS];
};
// User space sets, reads or removes a leaf.
struct letter {
	u32 range;
	u32 absent; // set by the program: there is no leaf, or none could be made
	struct leaf leaf;
};
// One per CPU, volume and program: a program is never re-entered on a CPU, so plain adds are exact.
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
	__uint(type, MAP_HASH);
	__uint(max_entries, 1 << 17); // the loader chooses by the memory of the machine
	__uint(map_flags, F_NO_PREALLOC);
	__type(key, u64); // see leaf_key()
	__type(value, struct leaf);
} leaves SEC(".maps");

// A leaf without bits, to make others of.
struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct leaf);
} blank SEC(".maps");

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, INBOX_LEAVES);
	__uint(map_flags, F_MMAPABLE);
	__type(key, u32);
	__type(value, struct letter);
} inbox SEC(".maps");

// Not a per-CPU array, because that cannot be mapped: user space reads it without a call. The loader makes it as long as the
// machine has possible CPUs.
struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, MAX_VOLUMES * PROGRAMS);
	__uint(map_flags, F_MMAPABLE);
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

static inline_always int set_bits(void *map, u32 at, u64 mask)
{
	u64 *found = bpf_map_lookup_elem(map, &at);

	if (!found)
		return 1;
	if ((*found & mask) != mask)
		__sync_fetch_and_or(found, mask);
	return 0;
}

struct leaf_walk {
	u64 first;
	u64 last;
	u32 slot;
	u32 region;
	u32 range; // of the first block
	u32 words;
	u32 summary_words;
	u32 failed;
};

// The range of a word: word / LEAF_WORDS, exact for any u32, without the division that nothing else here needs.
static inline_always u32 range_of(u32 word)
{
	return (u64)(word >> 3) * 613566757 >> 32;
}

static inline_always u64 leaf_key(u32 slot, u32 region, u32 range)
{
	return (u64)(slot * REGIONS + region) << 32 | range;
}

static inline_always struct leaf *make_leaf(u64 key)
{
	u32 zero = 0;
	struct leaf *empty = bpf_map_lookup_elem(&blank, &zero);

	if (!empty)
		return 0;
	// Refused where another CPU was faster, and where there is no memory or no room: the look tells.
	bpf_map_update_elem(&leaves, &key, empty, UPDATE_NOEXIST);
	return bpf_map_lookup_elem(&leaves, &key);
}

// The first write to a range since its half became active, or one that covers the whole of it.
static __attribute__((noinline)) struct leaf *first_in_range(struct leaf_walk *walk, u32 range, u32 covered)
{
	u32 slot = walk->slot, region = walk->region, word = range >> 6, at;
	void *map = bpf_map_lookup_elem(&bits, &slot);
	u64 bit = 1ULL << (range & 63), *whole;
	struct leaf *leaf;

	if (!map)
		goto failed;
	at = REGIONS * walk->words + region * walk->summary_words + (word >> 15);
	if (set_bits(map, at, 1ULL << ((word >> 9) & 63)))
		goto failed;
	if (set_bits(map, region * walk->words + word, bit))
		goto failed;
	at = REGIONS * (walk->words + walk->summary_words) + region * walk->words + word;
	whole = bpf_map_lookup_elem(map, &at);
	if (!whole)
		goto failed;
	if (*whole & bit)
		return 0;
	leaf = covered ? 0 : make_leaf(leaf_key(slot, region, range));
	if (leaf)
		return leaf;
	__sync_fetch_and_or(whole, bit);
	return 0;
failed:
	walk->failed = 1;
	return 0;
}

// Sets bits of one word of a leaf. 0 = set.
static inline_always int set_word(struct leaf *leaf, u32 at, u64 mask)
{
	asm volatile("" : "+r"(at)); // or the compiler finds the address before the bound is checked
	if (at >= LEAF_WORDS)
		return 1;
	if ((leaf->words[at] & mask) != mask)
		__sync_fetch_and_or(&leaf->words[at], mask);
	return 0;
}

struct fill {
	u64 key;
	u32 from;
	u32 failed;
};

// Sets all bits of the index-th word from the first on.
static long fill_word(u32 index, struct fill *fill)
{
	u64 key = fill->key;
	struct leaf *leaf = bpf_map_lookup_elem(&leaves, &key);

	if (leaf && !set_word(leaf, fill->from + index, ~0ULL))
		return 0;
	fill->failed = 1;
	return 1;
}

// Sets the bits of [first, last] that lie in the index-th range touched.
static long mark_leaf(u32 index, struct leaf_walk *walk)
{
	u32 first = walk->first >> 6, last = walk->last >> 6, range = walk->range + index;
	u32 base = range * LEAF_WORDS, from = first > base ? first - base : 0, to = last - base;
	u64 head = ~0ULL << (walk->first & 63), tail = ~0ULL >> (63 - (walk->last & 63)), mask;
	u64 key = leaf_key(walk->slot, walk->region, range);
	struct leaf *leaf = 0;
	int covered = (first < base || (first == base && head == ~0ULL)) &&
		      (to >= LEAF_WORDS || (to == LEAF_WORDS - 1 && tail == ~0ULL));

	if (!covered)
		leaf = bpf_map_lookup_elem(&leaves, &key);
	if (!leaf)
		leaf = first_in_range(walk, range, covered);
	if (!leaf)
		return walk->failed ? 1 : 0;
	mask = base + from == first ? head : ~0ULL;
	if (to >= LEAF_WORDS) {
		to = LEAF_WORDS - 1;
		tail = ~0ULL;
	}
	if (from == to)
		mask &= tail;
	if (set_word(leaf, from, mask) || (from != to && set_word(leaf, to, tail))) {
		walk->failed = 1;
		return 1;
	}
	// A loop of its own for the words in between: unrolled into this one, the verifier would walk every pair of their lengths.
	if (to - from > 1) {
		struct fill fill = { .key = key, .from = from + 1 };

		bpf_loop(to - from - 1, fill_word, &fill, 0);
		if (fill.failed) {
			walk->failed = 1;
			return 1;
		}
	}
	return 0;
}

// Sets the bits of blocks [first, last] of a volume with leaves; `shape` = words | summary_words << 32. 0 = all set.
__attribute__((noinline)) int mark_leaves(u32 slot, u32 region, u64 shape, u64 first, u64 last)
{
	struct leaf_walk walk = {
		.first = first, .last = last, .slot = slot, .region = region, .range = range_of(first >> 6),
		.words = shape, .summary_words = shape >> 32,
	};
	u32 ranges = range_of(last >> 6) - walk.range + 1;

	if (ranges == 1) {
		mark_leaf(0, &walk);
		return walk.failed;
	}
	// A bio holds less than 4 GiB: 294 ranges.
	if (ranges > 1 << 20 || bpf_loop(ranges, mark_leaf, &walk, 0) != ranges)
		return 1;
	return walk.failed;
}

enum { WORK_INSERT, WORK_READ, WORK_REMOVE, WORK_FORGET };
struct work {
	u32 what;
	u32 slot;
	u32 region;
	u32 letters;
};

static long insert_letter(u32 index, struct work *work)
{
	struct letter *letter = bpf_map_lookup_elem(&inbox, &index);
	struct leaf *leaf;
	u64 key, bits;
	u32 at;

	if (!letter)
		return 1;
	key = leaf_key(work->slot, work->region, letter->range);
	leaf = bpf_map_lookup_elem(&leaves, &key);
	if (!leaf)
		leaf = make_leaf(key);
	letter->absent = !leaf;
	if (!leaf)
		return 0;
	for (at = 0; at < LEAF_WORDS; at++) {
		bits = letter->leaf.words[at];
		if (bits)
			__sync_fetch_and_or(&leaf->words[at], bits);
	}
	return 0;
}

static long read_letter(u32 index, struct work *work)
{
	struct letter *letter = bpf_map_lookup_elem(&inbox, &index);
	struct leaf *leaf;
	u64 key;
	u32 at;

	if (!letter)
		return 1;
	key = leaf_key(work->slot, work->region, letter->range);
	leaf = bpf_map_lookup_elem(&leaves, &key);
	letter->absent = !leaf;
	if (!leaf)
		return 0;
	for (at = 0; at < LEAF_WORDS; at++)
		letter->leaf.words[at] = *(volatile u64 *)&leaf->words[at];
	return 0;
}

static long remove_letter(u32 index, struct work *work)
{
	struct letter *letter = bpf_map_lookup_elem(&inbox, &index);
	u64 key;

	if (!letter)
		return 1;
	key = leaf_key(work->slot, work->region, letter->range);
	bpf_map_delete_elem(&leaves, &key);
	return 0;
}

static long forget_leaf(void *map, u64 *key, struct leaf *leaf, struct work *work)
{
	u64 own = *key;

	if ((u32)(own >> 32) / REGIONS == work->slot)
		bpf_map_delete_elem(&leaves, &own);
	return 0;
}

// Leaves as user space needs them: the first `letters` letters of the inbox, or all leaves of a slot. Bits are set here because an
// update of a hash map's element by a system call replaces the element, and with it what a program on another CPU sets at
// that moment.
SEC("syscall") int leaf_work(struct work *asked)
{
	struct work work = {
		.what = asked->what, .slot = asked->slot, .region = asked->region, .letters = asked->letters,
	};
	u32 letters = work.letters;

	if (letters > INBOX_LEAVES)
		return 1;
	switch (work.what) {
	case WORK_INSERT:
		return bpf_loop(letters, insert_letter, &work, 0) != letters;
	case WORK_READ:
		return bpf_loop(letters, read_letter, &work, 0) != letters;
	case WORK_REMOVE:
		return bpf_loop(letters, remove_letter, &work, 0) != letters;
	case WORK_FORGET:
		return bpf_for_each_map_elem(&leaves, forget_leaf, &work, 0) < 0;
	}
	return 1;
}

static inline_always struct counters *counters_of(struct volume *volume, u32 program)
{
	u32 at = (bpf_get_smp_processor_id() * MAX_VOLUMES + volume->slot) * PROGRAMS + program;

	return bpf_map_lookup_elem(&counters, &at);
}

// Sets the bits of blocks [first, last] in half `half` of a volume. 0 = all set.
static inline_always int mark_range(struct volume *volume, u32 half, u64 first, u64 last)
{
	if (volume->sparse)
		return mark_leaves(volume->slot, half, (u64)volume->summary_words << 32 | volume->words, first, last);
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
		flight_refused(number_of(bio));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
