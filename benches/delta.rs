//! Rates of the delta room on one core: encode and decode of zero, random and text runs, zero detection, block digests.
//! Run with `cargo bench --bench delta`; bytes are plain bytes.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use doublure::delta::{BlockDigest, RECORD_HEADER_BYTES, decode, encode, encode_sectors, head, is_zero};
use doublure::model::{BLOCK_BYTES, BlockRun, FileSystem, Uuid, VolumeSpec};
use std::hint::black_box;

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}

/// Rows of a table dump whose numbers differ: what a database page compresses like, rather than one line over and over.
fn text(len: usize) -> Vec<u8> {
    let seeds = noise(len);
    let rows = seeds
        .chunks(4)
        .enumerate()
        .map(|(at, seed)| format!("{at}\taccount-{:02x}{:02x}\t{}\tpaid\n", seed[0], seed[1], seed[2]));
    rows.flat_map(String::into_bytes).take(len).collect()
}

/// A name and the bytes of a run of so many bytes.
type Content = (&'static str, fn(usize) -> Vec<u8>);
const CONTENTS: [Content; 3] = [("zero", |len| vec![0; len]), ("random", noise), ("text", text)];

fn records(c: &mut Criterion) {
    let volume = VolumeSpec {
        id: Uuid([1; 16]),
        name: "v".into(),
        size_bytes: 1 << 30,
        fs: FileSystem::Ext4,
        mount_options: String::new(),
    };
    let volumes = [volume];
    let mut group = c.benchmark_group("delta");
    for (name, make) in CONTENTS {
        for blocks in [1u64, 64] {
            let (run, plain) = (BlockRun { start: 7, count: blocks }, make((blocks * BLOCK_BYTES) as usize));
            let mut out = Vec::new();
            group.throughput(Throughput::Bytes(plain.len() as u64));
            group.bench_function(BenchmarkId::new(format!("encode/{name}"), blocks), |b| {
                b.iter(|| {
                    out.clear();
                    encode(0, run, black_box(&plain), &mut out);
                });
            });
            out.clear();
            encode(0, run, &plain, &mut out);
            let mut back = vec![0; plain.len()];
            group.bench_function(BenchmarkId::new(format!("decode/{name}"), blocks), |b| {
                b.iter(|| {
                    let head = head(black_box(&out), &volumes).unwrap().unwrap();
                    decode(&head, &out[RECORD_HEADER_BYTES..], &mut back).unwrap();
                });
            });
        }
    }
    let (plain, mut out) = (text(512), Vec::new());
    group.throughput(Throughput::Bytes(512));
    group.bench_function("encode/text/sector", |b| {
        b.iter(|| {
            out.clear();
            encode_sectors(0, 7, black_box(&plain), true, &mut out);
        });
    });
    let (zeroes, block) = (vec![0; 1 << 18], noise(BLOCK_BYTES as usize));
    group.throughput(Throughput::Bytes(zeroes.len() as u64));
    group.bench_function("is_zero", |b| b.iter(|| is_zero(black_box(&zeroes))));
    group.throughput(Throughput::Bytes(block.len() as u64));
    group.bench_function("digest", |b| b.iter(|| BlockDigest::of(black_box(&block))));
    group.finish();
}

criterion_group!(benches, records);
criterion_main!(benches);
