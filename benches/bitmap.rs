//! Rates of `BlockSet`: inserting scattered blocks, walking runs, union. Run with `cargo bench --bench bitmap`.
//! The device has 2^21 blocks (8 GiB); 20,480 of them are dirty (80 MiB), in random places: the cycle of the design's bars.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use doublure::model::{BlockRun, BlockSet};
use std::hint::black_box;

const BLOCKS: u64 = 1 << 21;
const DIRTY: u64 = 20_480;

fn scattered(mut state: u64) -> Vec<u64> {
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % BLOCKS
    })
    .take(DIRTY as usize)
    .collect()
}

fn set_of(blocks: &[u64]) -> BlockSet {
    let mut set = BlockSet::empty(BLOCKS);
    blocks.iter().for_each(|start| set.insert(BlockRun { start: *start, count: 1 }));
    set
}

fn sets(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap");
    let (places, others) = (scattered(1), set_of(&scattered(2)));
    let set = set_of(&places);
    group.throughput(Throughput::Elements(DIRTY));
    let mut into = BlockSet::empty(BLOCKS);
    group.bench_function("insert/scattered", |b| {
        b.iter(|| places.iter().for_each(|start| into.insert(BlockRun { start: black_box(*start), count: 1 })));
    });
    group.bench_function("runs/scattered", |b| b.iter(|| black_box(&set).runs(64).map(|run| run.count).sum::<u64>()));
    group.throughput(Throughput::Elements(BLOCKS));
    group.bench_function("insert/whole", |b| b.iter(|| into.insert(black_box(BlockRun { start: 0, count: BLOCKS }))));
    let full = BlockSet::full(BLOCKS);
    group.bench_function("runs/whole", |b| b.iter(|| black_box(&full).runs(64).map(|run| run.count).sum::<u64>()));
    group.bench_function("union", |b| b.iter(|| into.union(black_box(&others))));
    group.bench_function("count", |b| b.iter(|| black_box(&set).count()));
    group.finish();
}

criterion_group!(benches, sets);
criterion_main!(benches);
