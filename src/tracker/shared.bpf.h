/* SPDX-License-Identifier: GPL-2.0
 *
 * What the bitmap's programs and capture's have in common: kernel types with the fields that are read (the loader
 * relocates them against the running kernel's BTF), helpers, and the maps that both see.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define __array(name, val) typeof(val) *name[]
#define inline_always inline __attribute__((always_inline))

enum { MAP_HASH = 1, MAP_ARRAY = 2, MAP_PERCPU_ARRAY = 6, MAP_ARRAY_OF_MAPS = 12, MAP_RINGBUF = 27 };
enum { F_NO_PREALLOC = 1 << 0, F_MMAPABLE = 1 << 10, F_INNER_MAP = 1 << 12 };

struct bpf_dynptr {
	u64 opaque[2];
} __attribute__((aligned(8)));

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_probe_read_kernel)(void *to, u32 bytes, const void *from) = (void *)113;
static void *(*bpf_ringbuf_reserve)(void *ring, u64 bytes, u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *record, u64 flags) = (void *)132;
static struct task_struct *(*bpf_get_current_task_btf)(void) = (void *)158;
static long (*bpf_loop)(u32 nr, void *callback, void *ctx, u64 flags) = (void *)181;
static long (*bpf_ringbuf_reserve_dynptr)(void *ring, u32 bytes, u64 flags, struct bpf_dynptr *to) = (void *)198;
static void (*bpf_ringbuf_submit_dynptr)(struct bpf_dynptr *to, u64 flags) = (void *)199;
static void (*bpf_ringbuf_discard_dynptr)(struct bpf_dynptr *to, u64 flags) = (void *)200;
static void *(*bpf_dynptr_data)(const struct bpf_dynptr *of, u32 offset, u32 bytes) = (void *)203;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct block_device;
struct gendisk {
	int major;
	int first_minor;
	struct block_device *part0;
	u64 diskseq;
};
struct block_device {
	struct gendisk *bd_disk;
};
struct page {
	unsigned long flags;
};
struct bio_vec {
	struct page *bv_page;
	u32 bv_len;
	u32 bv_offset;
};
struct bvec_iter {
	u64 bi_sector;
	u32 bi_size;
	u32 bi_idx;
	u32 bi_bvec_done;
};
// The same since 7.3, where its last field has another name.
struct bvec_iter___renamed {
	u64 bi_sector;
	u32 bi_size;
	u32 bi_idx;
	u32 bi_offset;
};
struct bio_crypt_ctx;
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	struct bvec_iter bi_iter;
	void *bi_private;
	struct bio_vec *bi_io_vec;
	struct bio_crypt_ctx *bi_crypt_context;
};
struct request_queue {
	struct gendisk *disk;
};
struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u64 __sector;
	struct bio *bio;
};
struct mm_struct {
	void *pgd;
};
struct task_struct {
	struct mm_struct *mm;
};
#pragma clang attribute pop

enum { MAX_VOLUMES = 1024 };
// `enum req_op` of the kernel. An odd operation writes (op_is_write()); these four have kept number and meaning since
// before 5.15. Any other odd one (zones, passthrough) is counted: user space doubts.
enum { OP_MASK = 255, OP_WRITE = 1, OP_DISCARD = 3, OP_SECURE_ERASE = 5, OP_WRITE_ZEROES = 9 };

struct volume {
	u32 slot;
	u32 group;
	u64 diskseq;
	u64 blocks;
	u32 words; // of one half
	u32 summary_words; // of one half
	u32 sparse; // 1 = its blocks' bits are in leaves
	u32 unused;
};
// Read and written whole: what begins with a phase begins with one store.
struct group {
	u64 phase; // low half: counts flips, its remainder by two is the active half of the bitmaps; bit 32: capture is on
};
// A volume's account with its group's ring, in bytes; user space writes `taken` and `room`.
struct share {
	u64 put;
	u64 taken;
	u64 room;
	u64 lost; // changes of which not even a hole could be recorded
	u64 refused; // sectors submitted that never became a request
	u64 unused[3]; // a cache line each
};
struct record {
	u32 slot;
	u32 kind;
	u64 offset; // bytes
	u64 bytes; // of the range; of data, so many follow
};
// One write between submit and completion.
struct flight {
	u64 bio; // 0: free; 1: being written
	u64 sector;
	u32 sectors;
	u32 left; // sectors that have not completed
	u32 device; // as in `volumes`
	u32 slot;
};
enum { KIND_DATA = 1, KIND_ZERO = 2, KIND_HOLE = 3 };
// Faults planted by tests, `Plant` in capture.rs: constants for the verifier, so that they cost nothing.
enum {
	PLANT_NEXT_PAGE = 1,
	PLANT_LOSE_HOLE,
	PLANT_LOSE_DATA,
	PLANT_NO_ROOM,
	PLANT_UNSEEN,
	PLANT_OWN_DEVICE,
	PLANT_SUBMIT_ONLY,
	PLANT_UNSEEN_AND_NOT_ENTERED,
};
enum { FLIGHT_WAYS = 8, FLIGHT_SETS = 4096, FLIGHT_BUSY = 1 };
// Of one program copy and volume, per CPU.
struct sight {
	u64 sectors;
};
struct ring_map {
	__uint(type, MAP_RINGBUF);
	__uint(max_entries, 4096);
};

struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, MAX_VOLUMES);
	__uint(map_flags, F_NO_PREALLOC); // a preallocated element would be reused under a running program
	__type(key, u32); // major << 20 | first_minor
	__type(value, struct volume);
} volumes SEC(".maps");

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, MAX_VOLUMES);
	__uint(map_flags, F_MMAPABLE);
	__type(key, u32);
	__type(value, struct group);
} groups SEC(".maps");

// The ring of each group that captures, by the group's slot.
struct {
	__uint(type, MAP_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_VOLUMES);
	__type(key, u32);
	__array(values, struct ring_map);
} rings SEC(".maps");

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, MAX_VOLUMES);
	__uint(map_flags, F_MMAPABLE);
	__type(key, u32);
	__type(value, struct share);
} shares SEC(".maps");

// A pointer as a number: the verifier forbids sums with what it knows to be a pointer, and an exchange makes it forget.
// (`bpf_probe_read_kernel` would do as well, but a kernel locked down for confidentiality refuses it, and the bitmap must
// load there.)
static inline_always u64 number_of(const void *pointer)
{
	volatile u64 cell = 0;

	__sync_lock_test_and_set(&cell, (u64)pointer);
	return cell;
}

static inline_always struct volume *find(struct gendisk *disk)
{
	u32 dev = (u32)disk->major << 20 | (u32)disk->first_minor;

	return bpf_map_lookup_elem(&volumes, &dev);
}

// Of a planted fault: the same requests for every program, one in 64.
static inline_always int picked(u64 sector)
{
	return sector * 0x9e3779b97f4a7c15ULL >> 58 == 7;
}

static inline_always int unseen(u32 plant, u64 sector)
{
	return (plant == PLANT_UNSEEN || plant == PLANT_UNSEEN_AND_NOT_ENTERED) && picked(sector);
}

static inline_always int known(u32 op)
{
	return op == OP_WRITE || op == OP_DISCARD || op == OP_SECURE_ERASE || op == OP_WRITE_ZEROES;
}

// The one load of the phase that a program run makes. A group that cannot be found would mean a torn map: phase 0.
static inline_always u64 phase_of(struct volume *volume)
{
	u32 at = volume->group;
	struct group *group = bpf_map_lookup_elem(&groups, &at);

	return group ? *(volatile u64 *)&group->phase : 0;
}
