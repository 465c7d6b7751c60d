//! Rates of the format room: frames in and out, and the chained digest. Run with `cargo bench --bench format`.
//! Decoding copies the payload out of the stream once, as a socket's reader does.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use doublure::format::{FRAME_HEADER_BYTES, FRAME_PAYLOAD_MAX, FrameHead, Message, generation_digest};
use doublure::model::{Digest, Moment, Position, Uuid};
use std::hint::black_box;

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("format");
    let (position, digest) = (Position { epoch: 1, generation: 2 }, Digest([7; 32]));
    let messages = [
        ("chunks-64KiB", Message::Chunks { bytes: vec![0x5a; 64 << 10] }),
        ("chunks-1MiB", Message::Chunks { bytes: vec![0x5a; FRAME_PAYLOAD_MAX] }),
        ("digests-4096", Message::Digests { volume: 0, start: 0, digests: vec![0x5a; 4096 * 16] }),
        ("committed", Message::Committed { position, digest }),
        ("credit", Message::Credit { bytes: 1 << 20 }),
    ];
    for (name, message) in messages {
        let mut out = Vec::new();
        message.encode(&mut out);
        group.throughput(Throughput::Bytes(out.len() as u64));
        let frame = out.clone();
        group.bench_function(BenchmarkId::new("encode", name), |b| {
            b.iter(|| {
                out.clear();
                black_box(&message).encode(&mut out);
            });
        });
        group.bench_function(BenchmarkId::new("decode", name), |b| {
            b.iter(|| {
                let (header, payload) = black_box(&frame[..]).split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
                FrameHead::decode(header).unwrap().message(payload.to_vec()).unwrap()
            });
        });
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("generation_digest", |b| {
        b.iter(|| generation_digest(Uuid([1; 16]), black_box(position), position, digest, 1 << 30, digest, Moment(5)));
    });
    group.finish();
}

criterion_group!(benches, frames);
criterion_main!(benches);
