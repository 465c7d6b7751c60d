// SPDX-License-Identifier: GPL-2.0
//
// Capture: copies the data of every write of a group into one ring, as it completes.
//
// Why at completion. `block_rq_complete` fires before the submitter can learn that its write ended, so a write that
// depends on another has its record later: a prefix of the ring is a prefix of an order in which the writes may have
// happened. Nothing has to be waited for: a write in flight at a cut may be there in part, which is what a power cut
// could have left. Failed and refused writes never pass for data, and whatever a hole speaks of has already ended.
//
// Why two copies. A program is skipped while it runs on the same CPU (an interrupt; on kernels after 6.18 a preempting
// task). Copy b does what copy a was skipped for; a leaves the request that it did in `done`, b takes it away. Twice is
// harmless: nothing that depends on the write can have been submitted in between.
//
// A hole: "this range changed here, its data is not in the ring". If not even that finds room, `lost` grows.

#include "shared.bpf.h"

#define COPY_UNIT 4096

// What the loader found out about this kernel, and what the owner chose. Constants for the verifier.
const volatile struct {
	u64 vmemmap; // address of the first `struct page`
	u64 page_offset; // address at which physical memory is mapped
	u32 page_shift;
	u32 data_max_bytes; // of one request; larger: a hole
	u32 plant; // a fault planted by a test; 0 otherwise
	u32 unused;
} tune SEC(".rodata.tune") = { .page_shift = 12, .data_max_bytes = 256 << 10 };

struct {
	__uint(type, MAP_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} done SEC(".maps");

// Sectors whose completion each copy saw, whether capture was on or not: MAX_VOLUMES of two.
struct {
	__uint(type, MAP_PERCPU_ARRAY);
	__uint(max_entries, MAX_VOLUMES * 2);
	__type(key, u32);
	__type(value, struct sight);
} sights SEC(".maps");

// Of calibration: where the page of a known frame was seen.
struct calibration {
	u32 device;
	u32 found;
	u64 frame;
	u64 pattern[4];
	u64 vmemmap;
	u64 page_offset;
};
struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct calibration);
} calibrations SEC(".maps");

static inline_always u64 address_of(u64 page, u64 vmemmap, u64 page_offset)
{
	u64 size = __builtin_preserve_type_info(*(struct page *)0, 1);

	if (!size)
		return 0;
	return page_offset + ((page - vmemmap) / size << tune.page_shift);
}

static inline_always int capturing(struct volume *volume)
{
	return phase_of(volume) >> 32 & 1;
}

// Encrypted on its way to the device: memory holds other bytes than the disk will.
static inline_always int encrypted(struct bio *bio)
{
	if (!__builtin_preserve_field_info(bio->bi_crypt_context, 2))
		return 0;
	return bio->bi_crypt_context != 0;
}

static inline_always void hole(void *ring, struct share *share, u32 slot, u64 offset, u64 bytes)
{
	struct record *record;

	if (tune.plant == PLANT_LOSE_HOLE)
		return;
	record = bpf_ringbuf_reserve(ring, sizeof(*record), 0);
	if (!record) {
		__sync_fetch_and_add(&share->lost, 1);
		return;
	}
	record->slot = slot;
	record->kind = KIND_HOLE;
	record->offset = offset;
	record->bytes = bytes;
	bpf_ringbuf_submit(record, 0);
}

struct copy {
	struct bpf_dynptr to;
	u64 vec; // address of the current bio_vec
	u64 bio;
	u32 skip; // bytes of it that are done
	u32 bio_left; // bytes of the bio that are not done
	u32 left; // bytes of the request that are not done
	u32 at; // bytes done
	u32 failed;
};

static inline_always void enter_bio(struct copy *copy)
{
	struct bio *bio = (struct bio *)copy->bio;
	struct bvec_iter___renamed *renamed = (struct bvec_iter___renamed *)&bio->bi_iter;
	u32 size = 0, index = 0, done = 0;
	u64 vec = 0;

	bpf_probe_read_kernel(&vec, sizeof(vec), &bio->bi_io_vec);
	bpf_probe_read_kernel(&size, sizeof(size), &bio->bi_iter.bi_size);
	bpf_probe_read_kernel(&index, sizeof(index), &bio->bi_iter.bi_idx);
	if (__builtin_preserve_field_info(renamed->bi_offset, 2))
		bpf_probe_read_kernel(&done, sizeof(done), &renamed->bi_offset);
	else
		bpf_probe_read_kernel(&done, sizeof(done), &bio->bi_iter.bi_bvec_done);
	copy->vec = vec + (u64)index * __builtin_preserve_type_info(*(struct bio_vec *)0, 1);
	copy->skip = done;
	copy->bio_left = size;
}

// Copies the next piece: a unit that lies in one page and one vector, or 512 bytes of it.
static long copy_piece(u32 index, void *context)
{
	struct copy *copy = context;
	struct bio_vec vec = {};
	u32 room, in_page, offset;
	u64 from;
	void *to;

	if (!copy->left)
		return 1;
	if (!copy->bio_left) {
		u64 next = 0;

		bpf_probe_read_kernel(&next, sizeof(next), &((struct bio *)copy->bio)->bi_next);
		if (!next)
			goto failed;
		copy->bio = next;
		enter_bio(copy);
		if (!copy->bio_left)
			goto failed;
	}
	if (bpf_probe_read_kernel(&vec.bv_page, sizeof(vec.bv_page), &((struct bio_vec *)copy->vec)->bv_page) ||
	    bpf_probe_read_kernel(&vec.bv_len, sizeof(vec.bv_len), &((struct bio_vec *)copy->vec)->bv_len) ||
	    bpf_probe_read_kernel(&vec.bv_offset, sizeof(vec.bv_offset), &((struct bio_vec *)copy->vec)->bv_offset))
		goto failed;
	if (vec.bv_len <= copy->skip)
		goto failed;
	room = vec.bv_len - copy->skip;
	offset = vec.bv_offset + copy->skip;
	in_page = COPY_UNIT - (offset & (COPY_UNIT - 1));
	if (room > in_page)
		room = in_page;
	if (room > copy->bio_left)
		room = copy->bio_left;
	if (room > copy->left)
		room = copy->left;
	from = address_of((u64)vec.bv_page, tune.vmemmap, tune.page_offset) + offset;
	if (tune.plant == PLANT_NEXT_PAGE)
		from += COPY_UNIT;
	if (room >= COPY_UNIT) {
		room = COPY_UNIT;
		to = bpf_dynptr_data(&copy->to, sizeof(struct record) + copy->at, COPY_UNIT);
		if (!to || bpf_probe_read_kernel(to, COPY_UNIT, (void *)from))
			goto failed;
	} else {
		// Buffers that are not whole sectors exist (a queue's DMA alignment may be four bytes): too rare to be worth it.
		if (room < 512)
			goto failed;
		room = 512;
		to = bpf_dynptr_data(&copy->to, sizeof(struct record) + copy->at, 512);
		if (!to || bpf_probe_read_kernel(to, 512, (void *)from))
			goto failed;
	}
	copy->at += room;
	copy->left -= room;
	copy->bio_left -= room;
	copy->skip += room;
	if (copy->skip >= vec.bv_len) {
		copy->skip = 0;
		copy->vec += __builtin_preserve_type_info(*(struct bio_vec *)0, 1);
	}
	return 0;
failed:
	copy->failed = 1;
	return 1;
}

// The record of a write whose data is to be copied. 0 = made; else nothing of it is in the ring.
static inline_always int copy_data(void *ring, struct share *share, struct request *rq, u32 slot, u64 offset, u32 bytes)
{
	struct copy copy = { .left = bytes };
	struct record *record;
	u64 size = sizeof(*record) + bytes;

	if (share->put - share->taken + size > share->room)
		return 1;
	if (bpf_ringbuf_reserve_dynptr(ring, size, 0, &copy.to)) {
		bpf_ringbuf_discard_dynptr(&copy.to, 0);
		return 1;
	}
	record = bpf_dynptr_data(&copy.to, 0, sizeof(*record));
	if (!record) {
		bpf_ringbuf_discard_dynptr(&copy.to, 0);
		return 1;
	}
	record->slot = slot;
	record->kind = KIND_DATA;
	record->offset = offset;
	record->bytes = bytes;
	bpf_probe_read_kernel(&copy.bio, sizeof(copy.bio), &rq->bio);
	enter_bio(&copy);
	bpf_loop(bytes / 512 + 1, copy_piece, &copy, 0);
	if (copy.failed || copy.left || tune.plant == PLANT_LOSE_DATA) {
		bpf_ringbuf_discard_dynptr(&copy.to, 0);
		return tune.plant == PLANT_LOSE_DATA ? 0 : 1;
	}
	__sync_fetch_and_add(&share->put, size);
	bpf_ringbuf_submit_dynptr(&copy.to, 0);
	return 0;
}

struct ranges {
	void *unused;
	u64 bio;
	u32 slot;
	u32 group;
};

// One range of a discard of many.
static long hole_of_bio(u32 index, void *context)
{
	struct ranges *ranges = context;
	struct bio *bio = (struct bio *)ranges->bio;
	u32 slot = ranges->slot, group = ranges->group, size = 0;
	struct share *share = bpf_map_lookup_elem(&shares, &slot);
	void *ring = bpf_map_lookup_elem(&rings, &group);
	u64 sector = 0, next = 0;

	if (!bio || !share || !ring)
		return 1;
	bpf_probe_read_kernel(&sector, sizeof(sector), &bio->bi_iter.bi_sector);
	bpf_probe_read_kernel(&size, sizeof(size), &bio->bi_iter.bi_size);
	bpf_probe_read_kernel(&next, sizeof(next), &bio->bi_next);
	hole(ring, share, slot, sector << 9, size);
	ranges->bio = next;
	return 0;
}

static inline_always void capture(struct request *rq, u32 error, u32 bytes, struct volume *volume, u32 op)
{
	u32 slot = volume->slot, group = volume->group;
	struct share *share = bpf_map_lookup_elem(&shares, &slot);
	void *ring = bpf_map_lookup_elem(&rings, &group);
	u64 offset = rq->__sector << 9;

	if (!share)
		return;
	if (!ring || (tune.plant == PLANT_NO_ROOM && picked(rq->__sector))) {
		__sync_fetch_and_add(&share->lost, 1);
		return;
	}
	if (op == OP_WRITE && !error && bytes <= tune.data_max_bytes && rq->bio && !encrypted(rq->bio) &&
	    !copy_data(ring, share, rq, slot, offset, bytes))
		return;
	if (op == OP_DISCARD && rq->bio && rq->bio->bi_next) {
		// Devices that take many ranges in one discard merge bios that do not touch: each has its own range.
		struct ranges ranges = { .slot = slot, .group = group };

		bpf_probe_read_kernel(&ranges.bio, sizeof(ranges.bio), &rq->bio);
		bpf_loop(256, hole_of_bio, &ranges, 0);
		if (ranges.bio)
			__sync_fetch_and_add(&share->lost, 1);
		return;
	}
	if (op == OP_WRITE_ZEROES && !error) {
		struct record *record = bpf_ringbuf_reserve(ring, sizeof(*record), 0);

		if (record) {
			record->slot = slot;
			record->kind = KIND_ZERO;
			record->offset = offset;
			record->bytes = bytes;
			bpf_ringbuf_submit(record, 0);
			return;
		}
	}
	if (!known(op)) {
		__sync_fetch_and_add(&share->lost, 1);
		return;
	}
	hole(ring, share, slot, offset, bytes);
}

static inline_always void judge(struct request *rq, u64 address, u32 error, u32 bytes, u32 copy, struct volume *volume, u32 op,
				u64 *mark)
{
	struct gendisk *disk = rq->q->disk;

	if (copy && *mark == address) {
		*mark = 0;
		return;
	}
	if (!capturing(volume))
		return;
	if (tune.plant == PLANT_OWN_DEVICE && rq->bio && rq->bio->bi_bdev != disk->part0)
		return;
	capture(rq, error, bytes, volume, op);
	if (!copy)
		*mark = address;
}

static inline_always int ended(struct request *rq, u64 address, u32 error, u32 bytes, u32 copy)
{
	u32 op = rq->cmd_flags & OP_MASK, zero = 0, at;
	struct gendisk *disk;
	struct volume *volume;
	struct sight *sight;
	u64 *mark = bpf_map_lookup_elem(&done, &zero);

	if (!mark)
		return 0;
	// A mark that b was skipped for must not stay: its request's address comes again, perhaps for one that a is skipped for.
	if (!copy)
		*mark = 0;
	// A flush sequence ends twice, the second time with no bytes.
	if (!(op & 1) || !bytes)
		return 0;
	disk = rq->q->disk;
	volume = find(disk);
	if (!volume || disk->diskseq != volume->diskseq)
		return 0;
	if (unseen(tune.plant, rq->__sector))
		return 0;
	at = volume->slot * 2 + copy;
	judge(rq, address, error, bytes, copy, volume, op, mark);
	// Last: until the kernel counts it too, a few instructions later, it hides just as much that went by unseen.
	sight = bpf_map_lookup_elem(&sights, &at);
	if (sight)
		sight->sectors += bytes >> 9;
	return 0;
}

SEC("tp_btf/block_rq_complete") int capture_a(u64 *ctx)
{
	return ended((struct request *)ctx[0], number_of((void *)ctx[0]), (u8)ctx[1], (u32)ctx[2], 0);
}
SEC("tp_btf/block_rq_complete") int capture_b(u64 *ctx)
{
	return ended((struct request *)ctx[0], number_of((void *)ctx[0]), (u8)ctx[1], (u32)ctx[2], 1);
}

struct search {
	u64 from;
	struct calibration *calibration;
};

// Tries one candidate for the address at which physical memory is mapped.
static long try_offset(u32 index, void *context)
{
	struct search *search = context;
	u64 candidate = search->from - ((u64)index << 30), seen[4] = {};
	struct calibration *calibration;
	u32 zero = 0;

	calibration = bpf_map_lookup_elem(&calibrations, &zero);
	if (!calibration)
		return 1;
	if (bpf_probe_read_kernel(seen, sizeof(seen), (void *)(candidate + (calibration->frame << tune.page_shift))))
		return 0;
	if (seen[0] != calibration->pattern[0] || seen[1] != calibration->pattern[1] ||
	    seen[2] != calibration->pattern[2] || seen[3] != calibration->pattern[3])
		return 0;
	calibration->page_offset = candidate;
	calibration->found = 1;
	return 1;
}

// Sees the page of a known frame go by, in the context of the task that wrote it: the distance of its `struct page` from
// frame 0 is vmemmap; the task's page table lies in the mapping of physical memory, whose start is looked for below it.
SEC("tp_btf/block_bio_queue") int calibrate(u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[0];
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	struct task_struct *task = bpf_get_current_task_btf();
	u64 size = __builtin_preserve_type_info(*(struct page *)0, 1), vec = 0, pgd = 0, mm = 0, page = 0;
	struct calibration *calibration;
	struct search search = {};
	u32 zero = 0;

	calibration = bpf_map_lookup_elem(&calibrations, &zero);
	if (!calibration || calibration->found || (bio->bi_opf & OP_MASK) != OP_WRITE)
		return 0;
	if (((u32)disk->major << 20 | (u32)disk->first_minor) != calibration->device)
		return 0;
	bpf_probe_read_kernel(&vec, sizeof(vec), &bio->bi_io_vec);
	bpf_probe_read_kernel(&page, sizeof(page), &((struct bio_vec *)vec)->bv_page);
	bpf_probe_read_kernel(&mm, sizeof(mm), &task->mm);
	if (!mm)
		return 0;
	bpf_probe_read_kernel(&pgd, sizeof(pgd), &((struct mm_struct *)mm)->pgd);
	calibration->vmemmap = page - calibration->frame * size;
	search.from = pgd & ~((1ULL << 30) - 1);
	bpf_loop(1 << 16, try_offset, &search, 0);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
