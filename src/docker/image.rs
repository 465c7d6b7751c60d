//! Images: pinned, exported, proven, loaded. A name is never believed; a digest of what was read is.

use crate::docker::Docker;
use crate::docker::archive::{self, Contents};
use crate::docker::call;
use crate::docker::recipe::LABEL_RECIPE;
use crate::model::{Code, Fault, ImagePin, Res};
use bollard::errors::Error;
use bollard::models::{ContainerCreateBody, HostConfig, ImageInspect};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, ImportImageOptions, RemoveContainerOptionsBuilder, TagImageOptionsBuilder,
};
use bytes::Bytes;
use futures_util::StreamExt;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

/// The repository of our own tags. Nothing is ever pulled from or pushed to it.
const REPOSITORY: &str = "doublure.local/pin";
/// Patience with a whole load.
const LOAD: Duration = Duration::from_secs(3600);

fn thing(name: &str) -> String {
    format!("image {name}")
}

/// The tag of a digest: its first 12 hexadecimal digits.
fn tag_of(digest: &str) -> String {
    digest.trim_start_matches("sha256:").chars().take(12).collect()
}

/// Accepts a reference or id; it becomes part of a request's path.
fn check_reference(name: &str) -> Res<()> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-' | b'/' | b':' | b'@');
    match !name.is_empty() && name.len() <= 512 && name.bytes().all(fine) && !name.contains("..") && !name.starts_with('/') {
        true => Ok(()),
        false => Err(Fault::new(
            Code::BadArgument,
            format!("image name {:?}", name.chars().take(100).collect::<String>()),
            "it is not a reference that Docker would take",
            "use the name or id that `docker image ls` shows",
        )),
    }
}

fn check_pin(pin: &ImagePin) -> Res<()> {
    match archive::is_digest(&pin.config_digest) && pin.diff_ids.iter().all(|id| archive::is_digest(id)) {
        true => Ok(()),
        false => Err(Fault::new(
            Code::BadArgument,
            thing(&pin.name),
            "its pin is not made of sha256 digests",
            "protect the group again",
        )),
    }
}

/// An image as dockerd says it, if it is here.
pub(super) fn look(docker: &Docker, reference: &str) -> Res<Option<ImageInspect>> {
    check_reference(reference)?;
    docker.wait(&thing(reference), call::QUICK, async { call::found(docker.client.inspect_image(reference).await) })
}

/// An image that must be here: its id and itself.
fn must(docker: &Docker, reference: &str) -> Res<(String, ImageInspect)> {
    let missing = || Fault::new(Code::ImageMissing, thing(reference), "it is not on this host", "see `docker image ls`");
    let image = look(docker, reference)?.ok_or_else(missing)?;
    Ok((image.id.clone().filter(|id| archive::is_digest(id)).ok_or_else(missing)?, image))
}

fn layers(image: &ImageInspect) -> &[String] {
    image.root_fs.as_ref().and_then(|fs| fs.layers.as_deref()).unwrap_or_default()
}

/// The pin of a local image, under the name that people know it by.
pub(super) fn pin(docker: &Docker, reference: &str, name: &str) -> Res<ImagePin> {
    let (id, image) = must(docker, reference)?;
    if docker.containerd_store {
        let contents = read_through(docker, &id)?;
        docker.recall_proof(&contents.pin.config_digest, &id);
        return Ok(ImagePin { name: name.to_string(), ..contents.pin });
    }
    Ok(ImagePin { config_digest: id, diff_ids: layers(&image).to_vec(), name: name.to_string() })
}

/// Gives an image our tag. The tag keeps a plain prune away from it.
fn tag(docker: &Docker, id: &str, digest: &str) -> Res<String> {
    let tag = tag_of(digest);
    let options = TagImageOptionsBuilder::default().repo(REPOSITORY).tag(&tag).build();
    docker.wait(&thing(id), call::QUICK, docker.client.tag_image(id, Some(options)))?;
    Ok(format!("{REPOSITORY}:{tag}"))
}

/// A `save` stream as a blocking reader. Lives on a non-runtime thread.
struct SaveReader<'a> {
    docker: &'a Docker,
    stream: std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<Bytes, Error>> + 'a>>,
    piece: Bytes,
    read_bytes: u64,
}

impl<'a> SaveReader<'a> {
    fn new(docker: &'a Docker, reference: &'a str) -> Self {
        SaveReader { docker, stream: Box::pin(docker.client.export_image(reference)), piece: Bytes::new(), read_bytes: 0 }
    }
}

impl Read for SaveReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.piece.is_empty() {
            let next = async { tokio::time::timeout(call::PIECE, self.stream.next()).await };
            match self.docker.runtime.block_on(next) {
                Ok(Some(Ok(piece))) => self.piece = piece,
                Ok(Some(Err(error))) => return Err(std::io::Error::other(error)),
                Ok(None) => return Ok(0),
                Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
            }
        }
        let count = buffer.len().min(self.piece.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        self.read_bytes += count as u64;
        Ok(count)
    }
}

/// Reads a local image through and proves what it is, without keeping it.
fn read_through(docker: &Docker, reference: &str) -> Res<Contents> {
    archive::read(SaveReader::new(docker, reference)).map_err(|mut fault| {
        fault.thing = thing(reference);
        fault.next = "the image on this host is damaged or not whole: remove it and load it again".into();
        fault
    })
}

pub(super) fn export(docker: &Docker, name_or_id: &str, file: &Path) -> Res<(ImagePin, u64)> {
    let (id, image) = must(docker, name_or_id)?;
    let by_id = name_or_id.contains("sha256:") || id.trim_start_matches("sha256:").starts_with(name_or_id);
    let tags = image.repo_tags.iter().flatten();
    let name = match by_id {
        true => tags.filter(|tag| !tag.starts_with(REPOSITORY)).min().map_or(name_or_id, String::as_str),
        false => name_or_id,
    };
    // Exported under our tag and no other: loading it moves no name that somebody on the standby relies on.
    let ours = tag(docker, &id, &id)?;
    let result = write_out(docker, &ours, file).and_then(|bytes| {
        let contents = archive::read(open(file)?)?;
        if !docker.containerd_store && contents.pin.config_digest != id {
            return Err(Fault::new(Code::ImageMismatch, thing(name), "its tag moved during the export", "export it again"));
        }
        Ok((ImagePin { name: name.to_string(), ..contents.pin }, bytes))
    });
    if result.is_err() {
        // Half an archive helps nobody; the first error is the one to tell.
        let _ = std::fs::remove_file(file);
    }
    result
}

fn open(file: &Path) -> Res<File> {
    File::open(file).map_err(|e| Fault::io(file.display().to_string(), &e))
}

/// Writes a `save` stream to a new file, gives its length in bytes.
fn write_out(docker: &Docker, reference: &str, file: &Path) -> Res<u64> {
    let io = |e: std::io::Error| Fault::io(file.display().to_string(), &e);
    let _ = std::fs::remove_file(file);
    let mut to = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).map_err(io)?;
    let mut from = SaveReader::new(docker, reference);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = from.read(&mut buffer).map_err(|e| {
            Fault::new(
                Code::DockerError,
                thing(reference),
                format!("dockerd broke the export off: {e}"),
                "see dockerd's own log for more",
            )
        })?;
        if count == 0 {
            return Ok(from.read_bytes);
        }
        to.write_all(&buffer[..count]).map_err(io)?;
    }
}

pub(super) fn find(docker: &Docker, pin: &ImagePin) -> Res<Option<String>> {
    check_pin(pin)?;
    if !docker.containerd_store {
        // Here the id is the digest of the configuration, and that names the layers: dockerd looked both up.
        let image = look(docker, &pin.config_digest)?;
        let same = |image: &ImageInspect| image.id.as_deref() == Some(&pin.config_digest) && layers(image) == pin.diff_ids;
        return Ok(image.filter(same).and_then(|image| image.id));
    }
    // Layers are missing from the answer while the content is not whole.
    let whole = |image: ImageInspect| if layers(&image) == pin.diff_ids { image.id } else { None };
    let proven = docker.proofs().get(&pin.config_digest).cloned();
    if let Some(id) = &proven
        && look(docker, id)?.and_then(whole).as_ref() == Some(id)
    {
        return Ok(proven);
    }
    let reference = format!("{REPOSITORY}:{}", tag_of(&pin.config_digest));
    let Some(id) = look(docker, &reference)?.and_then(whole) else { return Ok(None) };
    let contents = read_through(docker, &id)?;
    if contents.pin.config_digest != pin.config_digest || contents.pin.diff_ids != pin.diff_ids {
        return Ok(None);
    }
    docker.recall_proof(&pin.config_digest, &id);
    Ok(Some(id))
}

pub(super) fn import(docker: &Docker, pin: &ImagePin, file: &Path) -> Res<String> {
    check_pin(pin)?;
    let refuse = |cause: String| {
        Fault::new(Code::ImageMismatch, thing(&pin.name), cause, "export it again on the primary; nothing was loaded")
    };
    // 1. Nothing reaches dockerd before every byte of the archive was checked.
    let contents = archive::read(std::io::BufReader::with_capacity(256 << 10, open(file)?))?;
    if contents.pin.config_digest != pin.config_digest {
        return Err(refuse(format!("the archive holds {}, the pin says {}", contents.pin.config_digest, pin.config_digest)));
    }
    if contents.pin.diff_ids != pin.diff_ids {
        return Err(refuse("the archive's layers are not those of the pin".into()));
    }
    // 2. Loading moves the names that stand in the archive: only ours may.
    if let Some(name) = contents.names.iter().find(|name| !name.starts_with(&format!("{REPOSITORY}:"))) {
        let name: String = name.chars().take(200).collect();
        return Err(refuse(format!("loading the archive would also move the name {name:?} on this host")));
    }
    // 3. Load.
    load(docker, pin, file)?;
    // 4. Find what was loaded by its content, not by what dockerd said.
    let id = match docker.containerd_store {
        false => find(docker, pin)?,
        true => match contents.names.first() {
            None => None,
            Some(name) => {
                let (id, _) = must(docker, name)?;
                let loaded = read_through(docker, &id)?.pin;
                let same = loaded.config_digest == pin.config_digest && loaded.diff_ids == pin.diff_ids;
                same.then(|| docker.recall_proof(&pin.config_digest, &id)).map(|()| id)
            }
        },
    };
    let lost = || {
        let cause = "dockerd took the archive, and does not have the image now";
        Fault::new(Code::ImageMissing, thing(&pin.name), cause, "see dockerd's own log for more, then import it again")
    };
    let id = id.ok_or_else(lost)?;
    tag(docker, &id, &pin.config_digest)?;
    // 5. A container that is never started: dockerd prepares its file system from the layers, or says that it cannot.
    try_out(docker, pin, &id)?;
    Ok(id)
}

/// Streams a file into dockerd, and reads all that it says: errors come inside an answer of 200.
fn load(docker: &Docker, pin: &ImagePin, file: &Path) -> Res<()> {
    let mut from = open(file)?;
    let (to, pieces) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(4);
    let reader = std::thread::spawn(move || {
        loop {
            let mut piece = vec![0; 256 << 10];
            let next = match from.read(&mut piece) {
                Ok(0) => return,
                Ok(count) => {
                    piece.truncate(count);
                    Ok(Bytes::from(piece))
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            // The other side is gone when dockerd has refused already.
            if to.blocking_send(next).is_err() {
                return;
            }
        }
    });
    let stream =
        futures_util::stream::unfold(pieces, |mut pieces| async move { pieces.recv().await.map(|piece| (piece, pieces)) });
    let said = docker.wait(&thing(&pin.name), LOAD, async {
        let mut answers =
            Box::pin(docker.client.import_image_stream(ImportImageOptions { quiet: true, ..Default::default() }, stream, None));
        let mut complaint = None;
        while let Some(answer) = answers.next().await {
            let answer = answer?;
            let words = answer.stream.or_else(|| answer.error_detail.and_then(|detail| detail.message)).unwrap_or_default();
            // containerd's store says "Error unpacking image" as plain text of a success.
            if words.trim_start().starts_with("Error") || words.contains("rror unpacking") {
                complaint = Some(words);
            }
        }
        Ok(complaint)
    });
    let _ = reader.join();
    match said? {
        None => Ok(()),
        Some(words) => {
            let cause = format!("dockerd could not load it: {}", call::redact(words.trim(), &[]));
            Err(Fault::new(Code::DockerError, thing(&pin.name), cause, "see dockerd's own log for more"))
        }
    }
}

/// Makes and removes a container of the image.
fn try_out(docker: &Docker, pin: &ImagePin, id: &str) -> Res<()> {
    let name = format!("doublure-probe-{}", tag_of(&pin.config_digest));
    let body = ContainerCreateBody {
        image: Some(id.to_string()),
        // An image without a command is no reason to fail: it is never started.
        cmd: Some(vec!["-".into()]),
        labels: Some(HashMap::from([(LABEL_RECIPE.to_string(), "probe".to_string())])),
        host_config: Some(HostConfig { network_mode: Some("none".into()), ..Default::default() }),
        ..Default::default()
    };
    let remove = RemoveContainerOptionsBuilder::default().v(true).build();
    docker.wait(&thing(&pin.name), call::START, async {
        let client = &docker.client;
        let left_over = call::found(client.inspect_container(&name, None).await)?;
        let labels = left_over.and_then(|container| container.config).and_then(|config| config.labels).unwrap_or_default();
        if labels.get(LABEL_RECIPE).is_some_and(|label| label == "probe") {
            call::found(client.remove_container(&name, Some(remove.clone())).await)?;
        }
        client.create_container(Some(CreateContainerOptionsBuilder::default().name(&name).build()), body).await?;
        client.remove_container(&name, Some(remove)).await
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_that_would_lead_elsewhere_are_refused() {
        for bad in ["", "a b", "../containers", "/x", "x?y=1", "x#y", "é", "a%2e"] {
            assert!(check_reference(bad).is_err(), "{bad:?}");
        }
        let digest = format!("sha256:{}", "0".repeat(64));
        for good in ["app:1", "registry.local:5000/shop/db@sha256:00", &digest] {
            assert!(check_reference(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_tag_is_twelve_digits() {
        assert_eq!(tag_of("sha256:0123456789abcdef"), "0123456789ab");
    }
}
