//! An image archive as `docker save` writes it, read once from front to end: which image it holds, proven from its own bytes.
//!
//! Two layouts occur: the old one (`manifest.json`, `<hex>.json`, `<hex>/layer.tar`) and the OCI one (`manifest.json`,
//! `index.json`, `blobs/sha256/<hex>`). In both, `manifest.json` names the configuration and the layers. Names in the archive
//! prove nothing, so every file is hashed, and what the configuration says of its layers is compared with what the layers are.

use crate::model::{Code, Fault, ImagePin, Res};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Component, Path};

/// More entries than any image has: at most 127 layers of three files each, twice over for blobs.
const ENTRIES_MAX: usize = 20_000;
/// Largest JSON file that is kept to be read, in bytes.
const JSON_BYTES_MAX: usize = 4 << 20;
/// Bytes of JSON kept in all.
const JSON_TOTAL_MAX: usize = 32 << 20;

/// What an archive holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contents {
    /// The image, its name left empty.
    pub pin: ImagePin,
    /// Every name that loading it would give to the image.
    pub names: Vec<String>,
}

/// One file of the archive.
struct Member {
    /// sha256 of the bytes as they stand.
    plain: String,
    /// sha256 of the bytes after decompression; the same when they are not compressed.
    unpacked: String,
    /// The bytes, when they look like JSON and are few.
    json: Option<Vec<u8>>,
}

enum Entry {
    File(Member),
    Link(String),
}

/// Hex of a sha256, as Docker writes it.
fn sha256_text(hasher: Sha256) -> String {
    let mut text = String::from("sha256:");
    for byte in hasher.finalize() {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// `sha256:<64 hex>` of some bytes.
pub(super) fn sha256_of(bytes: &[u8]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(bytes);
    sha256_text(hasher)
}

/// Whether a text is `sha256:` and 64 lower-case hexadecimal digits.
pub(super) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

fn mismatch(cause: impl Into<String>) -> Fault {
    Fault::new(Code::ImageMismatch, "image archive", cause, "export the image again on the primary; nothing was loaded")
}

fn unreadable(error: &std::io::Error) -> Fault {
    mismatch(format!("it cannot be read to its end as a tar archive: {error}"))
}

/// A hasher that takes what a decompressor gives.
struct HashSink(Sha256);

impl Write for HashSink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Reads the whole archive and proves what it holds. Memory: bounded by [`JSON_TOTAL_MAX`] and [`ENTRIES_MAX`], whatever comes.
/// `IMAGE_MISMATCH` when it is not one whole image.
pub(super) fn read(reader: impl Read) -> Res<Contents> {
    let entries = members(reader)?;
    let manifest = json(&entries, "manifest.json")?;
    let images = manifest.as_array().map(Vec::as_slice).unwrap_or_default();
    let [image] = images else {
        return Err(mismatch(format!("its manifest.json lists {} images, not one", images.len())));
    };
    let text = |value: &serde_json::Value| value.as_str().map(str::to_string);
    let texts = |value: &serde_json::Value| -> Vec<String> { value.as_array().into_iter().flatten().filter_map(text).collect() };

    let config_path = text(&image["Config"]).ok_or_else(|| mismatch("its manifest.json names no configuration"))?;
    let config_digest = lookup(&entries, &config_path)?.plain.clone();
    let config = json(&entries, &config_path)?;
    let diff_ids = texts(&config["rootfs"]["diff_ids"]);
    let layers = texts(&image["Layers"]);
    if diff_ids.len() != layers.len() || diff_ids.is_empty() || !diff_ids.iter().all(|id| is_digest(id)) {
        return Err(mismatch(format!("its configuration tells {} layers, its manifest {}", diff_ids.len(), layers.len())));
    }
    for (number, (path, diff_id)) in layers.iter().zip(&diff_ids).enumerate() {
        let layer = lookup(&entries, path)?;
        if layer.unpacked != *diff_id {
            let cause = format!("layer {number} is {}, but its configuration says {diff_id}", layer.unpacked);
            return Err(mismatch(cause));
        }
    }
    let mut names = texts(&image["RepoTags"]);
    if entries.contains_key("index.json") {
        let index = json(&entries, "index.json")?;
        for manifest in index["manifests"].as_array().into_iter().flatten() {
            let notes = &manifest["annotations"];
            // containerd takes the first of these two as the name; the second alone may be a bare tag.
            if let Some(name) =
                text(&notes["io.containerd.image.name"]).or_else(|| text(&notes["org.opencontainers.image.ref.name"]))
            {
                names.push(name);
            }
        }
    }
    names.sort();
    names.dedup();
    Ok(Contents { pin: ImagePin { config_digest, diff_ids, name: String::new() }, names })
}

/// Hashes every file of the archive.
fn members(reader: impl Read) -> Res<BTreeMap<String, Entry>> {
    let mut archive = tar::Archive::new(reader);
    let mut entries = BTreeMap::new();
    let mut kept = 0;
    for entry in archive.entries().map_err(|e| unreadable(&e))? {
        let mut entry = entry.map_err(|e| unreadable(&e))?;
        let path = normal(Path::new(""), &entry.path().map_err(|e| unreadable(&e))?)?;
        let kind = entry.header().entry_type();
        let made = if kind.is_dir() {
            continue;
        } else if kind.is_file() {
            let member = hash(&mut entry, JSON_TOTAL_MAX - kept)?;
            kept += member.json.as_ref().map_or(0, Vec::len);
            Entry::File(member)
        } else if kind.is_symlink() || kind.is_hard_link() {
            let target = entry.link_name().map_err(|e| unreadable(&e))?.ok_or_else(|| mismatch("it has a link to nowhere"))?;
            // A symbolic link counts from its own directory, a hard link from the top.
            let base = if kind.is_symlink() { Path::new(&path).parent().unwrap_or(Path::new("")) } else { Path::new("") };
            Entry::Link(normal(base, &target)?)
        } else {
            return Err(mismatch("it holds something that is neither a file, a directory nor a link"));
        };
        // What comes twice would be one thing to us and another to dockerd.
        if entries.insert(path, made).is_some() {
            return Err(mismatch("it holds the same name twice"));
        }
        if entries.len() > ENTRIES_MAX {
            return Err(mismatch(format!("it holds more than {ENTRIES_MAX} files")));
        }
    }
    Ok(entries)
}

/// A path inside the archive, `..` resolved; one that leaves the archive is refused.
fn normal(base: &Path, path: &Path) -> Res<String> {
    let mut parts: Vec<String> = Vec::new();
    for component in base.components().chain(path.components()) {
        match component {
            Component::Normal(part) => {
                parts.push(part.to_str().ok_or_else(|| mismatch("it holds a name that is not text"))?.to_string())
            }
            Component::CurDir => {}
            Component::ParentDir if parts.pop().is_some() => {}
            _ => return Err(mismatch("it holds a path that leads out of it")),
        }
    }
    match parts.join("/") {
        path if path.len() <= 4096 => Ok(path),
        _ => Err(mismatch("it holds a path that is too long")),
    }
}

/// Reads one file: both digests, and the bytes when they look like JSON.
fn hash(entry: &mut impl Read, json_room: usize) -> Res<Member> {
    let mut plain = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut unpacker: Option<flate2::write::MultiGzDecoder<HashSink>> = None;
    let mut json: Option<Vec<u8>> = None;
    let mut begun = false;
    loop {
        let count = read_full(entry, &mut buffer).map_err(|e| unreadable(&e))?;
        let bytes = &buffer[..count];
        if !begun {
            begun = true;
            match bytes {
                [0x1f, 0x8b, ..] => unpacker = Some(flate2::write::MultiGzDecoder::new(HashSink(Sha256::new()))),
                [0x28, 0xb5, 0x2f, 0xfd, ..] => return Err(mismatch("it holds a zstd layer, which cannot be checked yet")),
                [b'{' | b'[', ..] => json = Some(Vec::new()),
                _ => {}
            }
        }
        if count == 0 {
            break;
        }
        plain.update(bytes);
        if let Some(unpacker) = &mut unpacker {
            unpacker.write_all(bytes).map_err(|e| unreadable(&e))?;
        }
        if let Some(kept) = &mut json {
            kept.extend_from_slice(bytes);
            if kept.len() > JSON_BYTES_MAX.min(json_room) {
                json = None;
            }
        }
    }
    let plain = sha256_text(plain);
    let unpacked = match unpacker {
        Some(unpacker) => sha256_text(unpacker.finish().map_err(|e| unreadable(&e))?.0),
        None => plain.clone(),
    };
    Ok(Member { plain, unpacked, json })
}

/// Fills the buffer unless the input ends, so that the first bytes of a file come together.
fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The file at a path, through at most a few links (the same layer twice is a link in old archives).
fn lookup<'a>(entries: &'a BTreeMap<String, Entry>, path: &str) -> Res<&'a Member> {
    let mut at = normal(Path::new(""), Path::new(path))?;
    for _ in 0..8 {
        match entries.get(&at) {
            Some(Entry::File(member)) => return Ok(member),
            Some(Entry::Link(target)) => at = target.clone(),
            None => break,
        }
    }
    Err(mismatch(format!("it lacks {:?}", path.chars().take(200).collect::<String>())))
}

fn json(entries: &BTreeMap<String, Entry>, path: &str) -> Res<serde_json::Value> {
    let bytes = lookup(entries, path)?.json.as_ref();
    let bytes = bytes
        .ok_or_else(|| mismatch(format!("{:?} in it is no JSON of a sane size", path.chars().take(200).collect::<String>())))?;
    serde_json::from_slice(bytes)
        .map_err(|e| mismatch(format!("{:?} in it is no JSON: {e}", path.chars().take(200).collect::<String>())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Files and links of an archive to be.
    struct Build(tar::Builder<Vec<u8>>);

    impl Build {
        fn new() -> Self {
            Build(tar::Builder::new(Vec::new()))
        }
        fn file(mut self, path: &str, bytes: &[u8]) -> Self {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            self.0.append_data(&mut header, path, bytes).unwrap();
            self
        }
        fn link(mut self, path: &str, target: &str) -> Self {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            self.0.append_link(&mut header, path, target).unwrap();
            self
        }
        fn done(self) -> Vec<u8> {
            self.0.into_inner().unwrap()
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    fn config(layers: &[&[u8]]) -> Vec<u8> {
        let diff_ids: Vec<String> = layers.iter().map(|l| sha256_of(l)).collect();
        json!({"os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string().into_bytes()
    }

    fn manifest(config: &str, layers: &[&str]) -> Vec<u8> {
        json!([{"Config": config, "RepoTags": ["doublure.local/pin:0123"], "Layers": layers}]).to_string().into_bytes()
    }

    #[test]
    fn an_old_archive_with_a_repeated_layer_gives_its_pin() {
        let config = config(&[b"one", b"two", b"one"]);
        let manifest = manifest("abc.json", &["1/layer.tar", "2/layer.tar", "3/layer.tar"]);
        let bytes = Build::new()
            .file("1/layer.tar", b"one")
            .file("2/layer.tar", b"two")
            .link("3/layer.tar", "../1/layer.tar")
            .file("abc.json", &config)
            .file("manifest.json", &manifest)
            .done();
        let contents = read(&bytes[..]).unwrap();
        assert_eq!(contents.pin.config_digest, sha256_of(&config));
        assert_eq!(contents.pin.diff_ids, vec![sha256_of(b"one"), sha256_of(b"two"), sha256_of(b"one")]);
        assert_eq!(contents.names, vec!["doublure.local/pin:0123"]);
    }

    #[test]
    fn an_oci_archive_with_compressed_layers_gives_the_same_pin() {
        let config = config(&[b"one", b"two"]);
        let manifest = manifest("blobs/sha256/c", &["blobs/sha256/1", "blobs/sha256/2"]);
        let index = json!({"manifests": [{"annotations": {"io.containerd.image.name": "docker.io/evil:1"}}]}).to_string();
        let bytes = Build::new()
            .file("blobs/sha256/1", &gzip(b"one"))
            .file("blobs/sha256/2", b"two")
            .file("blobs/sha256/c", &config)
            .file("index.json", index.as_bytes())
            .file("manifest.json", &manifest)
            .done();
        let contents = read(&bytes[..]).unwrap();
        assert_eq!(contents.pin.diff_ids, vec![sha256_of(b"one"), sha256_of(b"two")]);
        assert_eq!(contents.names, vec!["docker.io/evil:1", "doublure.local/pin:0123"]);
    }

    #[test]
    fn what_is_not_one_whole_image_is_refused() {
        let good = config(&[b"one"]);
        let plain = || Build::new().file("c", &good);
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("not one", plain().file("1", b"one").file("manifest.json", b"[]").done()),
            ("layer 0 is", plain().file("1", b"changed").file("manifest.json", &manifest("c", &["1"])).done()),
            ("it lacks \"1\"", plain().file("manifest.json", &manifest("c", &["1"])).done()),
            ("it lacks \"manifest.json\"", plain().file("1", b"one").done()),
            ("tells 1 layers", plain().file("1", b"one").file("manifest.json", &manifest("c", &["1", "1"])).done()),
            ("same name twice", plain().file("1", b"one").file("1", b"one").file("manifest.json", &manifest("c", &["1"])).done()),
            ("leads out", plain().link("1", "../../etc/passwd").file("manifest.json", &manifest("c", &["1"])).done()),
            ("it lacks \"1\"", plain().link("1", "2").link("2", "1").file("manifest.json", &manifest("c", &["1"])).done()),
            ("zstd", plain().file("1", &[0x28, 0xb5, 0x2f, 0xfd, 0]).done()),
            ("no JSON", plain().file("1", b"one").file("manifest.json", b"[{").done()),
        ];
        for (want, bytes) in cases {
            let fault = read(&bytes[..]).unwrap_err();
            assert_eq!(fault.code, Code::ImageMismatch);
            assert!(fault.cause.contains(want), "{want}: {fault}");
        }
    }

    #[test]
    fn a_cut_archive_is_refused_at_every_length() {
        let config = config(&[b"one"]);
        let whole = Build::new().file("1", b"one").file("c", &config).file("manifest.json", &manifest("c", &["1"])).done();
        let end_of_data = whole.len() - 1024;
        assert!(read(&whole[..]).is_ok());
        for len in (0..end_of_data - 512).step_by(97) {
            assert!(read(&whole[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn every_flipped_byte_of_a_layer_or_configuration_shows() {
        let config = config(&[b"one", b"two"]);
        let bytes = Build::new()
            .file("1", b"one")
            .file("2", b"two")
            .file("c", &config)
            .file("manifest.json", &manifest("c", &["1", "2"]))
            .done();
        let pin = read(&bytes[..]).unwrap().pin;
        // One header of 512 bytes before each file, each padded to 512: the data of layer 1, layer 2 and the configuration.
        let data = (512..515).chain(1536..1539).chain(2560..2560 + config.len());
        for at in data {
            let mut bent = bytes.clone();
            bent[at] ^= 0x20;
            assert!(read(&bent[..]).map(|contents| contents.pin) != Ok(pin.clone()), "byte {at} changed unseen");
        }
    }
}
