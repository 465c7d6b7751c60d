/* SPDX-License-Identifier: GPL-2.0
 *
 * The in-flight table: which writes were submitted and have not been seen to complete.
 *
 * A completion can go by unseen (kernel-notes T8). Then nobody would know that the block changed after it was read; with the
 * table its range is known: the entry stays, until somebody looks (user space, when the kernel's account of the disk
 * is ahead of ours), or until the same bio is submitted again, which is proof that the old one has ended.
 *
 * A set-associative table: a bio's address names its set. Filled by the first copy of `submit` and emptied by the first
 * copy of `complete` alone; what those are skipped for errs to the safe side (an entry that stays), or is counted
 * (`untracked`, and the copy's misses).
 */

struct flight_set {
	struct flight ways[FLIGHT_WAYS];
};
struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, FLIGHT_SETS);
	__uint(map_flags, F_MMAPABLE);
	__type(key, u32);
	__type(value, struct flight_set);
} flights SEC(".maps");

static inline_always struct flight_set *flights_of(u64 bio)
{
	u32 at = (bio >> 6) * 0x9e3779b97f4a7c15ULL >> 52;

	return bpf_map_lookup_elem(&flights, &at);
}

// The completion of this write went by unseen: its blocks are dirty now, and what capture made of them does not hold it.
__attribute__((noinline)) int flight_lost(struct flight *flight)
{
	struct volume *volume;
	struct share *share;
	struct record *record;
	void *ring;
	u64 sector, phase, first, last;
	u32 device, sectors, slot, group;

	if (!flight)
		return 0;
	device = flight->device;
	sector = flight->sector;
	sectors = flight->sectors;
	volume = bpf_map_lookup_elem(&volumes, &device);
	if (!volume || !sectors || volume->slot != flight->slot)
		return 0;
	phase = phase_of(volume);
	first = sector >> 3;
	last = (sector + sectors - 1) >> 3;
	if (first >= volume->blocks)
		return 0;
	if (last >= volume->blocks)
		last = volume->blocks - 1;
	slot = volume->slot;
	group = volume->group;
	share = bpf_map_lookup_elem(&shares, &slot);
	if (mark_range(volume, (u32)phase % HALVES, first, last) && share)
		__sync_fetch_and_add(&share->lost, 1);
	if (!(phase >> 32 & 1) || !share)
		return 0;
	ring = bpf_map_lookup_elem(&rings, &group);
	record = ring ? bpf_ringbuf_reserve(ring, sizeof(*record), 0) : 0;
	if (!record) {
		__sync_fetch_and_add(&share->lost, 1);
		return 0;
	}
	record->slot = slot;
	record->kind = KIND_HOLE;
	record->offset = sector << 9;
	record->bytes = (u64)sectors << 9;
	bpf_ringbuf_submit(record, 0);
	return 0;
}

// Enters a write. 0 = it stands in the table.
static inline_always int flight_begin(u64 bio, struct volume *volume, u32 device, u64 sector, u32 bytes)
{
	struct flight_set *set = flights_of(bio);
	int way, place = -1;

	if (!set)
		return 1;
	for (way = 0; way < FLIGHT_WAYS; way++) {
		if (set->ways[way].bio == bio) {
			flight_lost(&set->ways[way]);
			place = way;
			break;
		}
	}
	for (way = 0; way < FLIGHT_WAYS && place < 0; way++) {
		if (!set->ways[way].bio && !__sync_val_compare_and_swap(&set->ways[way].bio, 0, FLIGHT_BUSY))
			place = way;
	}
	for (way = 0; way < FLIGHT_WAYS; way++) {
		if (way != place)
			continue;
		set->ways[way].sector = sector;
		set->ways[way].sectors = bytes >> 9;
		set->ways[way].left = bytes >> 9;
		set->ways[way].device = device;
		set->ways[way].slot = volume->slot;
		__sync_lock_test_and_set(&set->ways[way].bio, bio);
		return 0;
	}
	return 1;
}

// So many sectors of a bio have completed. 0 = it stands in the table.
__attribute__((noinline)) int flight_progress(u64 bio, u32 sectors)
{
	struct flight_set *set = flights_of(bio);
	int way;

	if (!set || bio <= FLIGHT_BUSY) // no bio: a free place, or one that is just being taken
		return 1;
	for (way = 0; way < FLIGHT_WAYS; way++) {
		if (set->ways[way].bio != bio)
			continue;
		if (__sync_fetch_and_sub(&set->ways[way].left, sectors) <= sectors)
			set->ways[way].bio = 0;
		return 0;
	}
	return 1;
}

// A write that will never be a request leaves the table; its sectors were counted as submitted and will not be by the kernel.
static inline_always void flight_refused(u64 bio)
{
	struct flight_set *set = flights_of(bio);
	struct share *share;
	u32 slot;
	int way;

	if (!set)
		return;
	for (way = 0; way < FLIGHT_WAYS; way++) {
		if (set->ways[way].bio != bio)
			continue;
		slot = set->ways[way].slot;
		share = bpf_map_lookup_elem(&shares, &slot);
		if (share)
			__sync_fetch_and_add(&share->refused, set->ways[way].left); // a piece split off before may have been written
		set->ways[way].bio = 0;
		return;
	}
}

// What completed of a request leaves the table. More bios than the bound (never seen) would only stay in it too long.
static inline_always void flights_end(struct request *rq, u32 left)
{
	struct bio *bio = rq->bio;
	int i;

	for (i = 0; i < 1024 && bio && left; i++) {
		u32 size = bio->bi_iter.bi_size;

		if (size > left)
			size = left;
		// A piece that the kernel split off has an address of its own; its `bi_private` then is the bio that we know.
		if (flight_progress(number_of(bio), size >> 9))
			flight_progress(number_of(bio->bi_private), size >> 9);
		left -= size;
		bio = bio->bi_next;
	}
}
