//! Owns the Docker API: volumes, containers, images, start, stop, health.
//! Gives facts as dockerd says them and identities that survive save/load.
//! Keeps secrets of recipes out of logs and errors.
//! Never learns what a block is, never removes what it did not make, never pulls.
//! Assumes the notes headed K in `kernel-notes.md`.

mod archive;
mod call;
mod container;
mod image;
mod network;
mod recipe;
mod volume;

pub use recipe::volumes_of;

use crate::model::{Code, ContainerSpec, Fault, FileSystem, ImagePin, Res};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

/// A connection to one dockerd. All calls block; never call them on the runtime.
pub struct Docker {
    runtime: tokio::runtime::Handle,
    client: bollard::Docker,
    /// Whether images live in containerd's store, where an image's id is not its configuration's digest.
    containerd_store: bool,
    /// Configuration digest -> local id, for images whose content was proven (containerd store only).
    proven: Mutex<BTreeMap<String, String>>,
}

/// A Docker volume as dockerd says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerVolume {
    /// Its driver.
    pub driver: String,
    /// Its options, sorted.
    pub options: std::collections::BTreeMap<String, String>,
}

/// How a container does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Whether it runs.
    pub running: bool,
    /// Its main process in our pid namespace, 0 = none.
    pub pid: u32,
    /// `healthy`, `unhealthy`, `starting`, or `None` without a health check.
    pub health: Option<String>,
    /// dockerd's own words on its last failure.
    pub error: String,
}

impl Docker {
    /// Connects and negotiates the API version. `DOCKER_ERROR`.
    pub fn connect(runtime: tokio::runtime::Handle, socket: &Path) -> Res<Docker> {
        let thing = format!("dockerd at {}", socket.display());
        let path = socket.to_str().ok_or_else(|| {
            Fault::new(
                Code::ConfigInvalid,
                thing.clone(),
                "the path of its socket is not text",
                "set docker_socket to a plain path",
            )
        })?;
        // bollard's own timeout is a last resort behind the shorter ones of each call.
        let client = bollard::Docker::connect_with_unix(path, call::PIECE.as_secs(), bollard::API_DEFAULT_VERSION);
        let client = client.map_err(|error| call::fault(&thing, &error, &[]))?;
        let (client, info) = call::wait(&runtime, &thing, call::QUICK, async {
            let client = client.negotiate_version().await?;
            let info = client.info().await?;
            Ok((client, info))
        })?;
        let containerd_store =
            info.driver_status.iter().flatten().flatten().any(|word| word.starts_with("io.containerd.snapshotter"));
        Ok(Docker { runtime, client, containerd_store, proven: Mutex::default() })
    }
    /// A volume, if there is one.
    pub fn volume(&self, name: &str) -> Res<Option<DockerVolume>> {
        volume::look(self, name)
    }
    /// Makes a `local` volume on a device, or finds the same one (`false`); `NAME_TAKEN` when it differs.
    pub fn ensure_volume(&self, name: &str, fs: FileSystem, device_link: &Path, mount_options: &str) -> Res<bool> {
        volume::ensure(self, name, fs, device_link, mount_options)
    }
    /// Removes a volume that we made (its device must be this link). `false`: there is none. `NAME_TAKEN` when it is another,
    /// `VOLUME_IN_USE` while a container has it.
    pub fn remove_volume(&self, name: &str, device_link: &Path) -> Res<bool> {
        volume::remove(self, name, device_link)
    }
    /// Containers (running or not) that use a volume by name.
    pub fn users_of_volume(&self, name: &str) -> Res<Vec<String>> {
        volume::users(self, name)
    }
    /// Names of the volumes that a container mounts, and of its other mounts, as (kind, source).
    pub fn mounts_of(&self, container: &str) -> Res<Vec<(String, String)>> {
        container::mounts(self, container)
    }
    /// Captures a container: raw inspect, the definitions of its networks, and its image's pin. On a containerd store the image is read through once for its pin.
    pub fn capture(&self, container: &str) -> Res<ContainerSpec> {
        container::capture(self, container)
    }
    /// Exports an image to a file (0600) as an archive; the pin is computed from the archive itself. Returns (pin, bytes).
    /// The image gets the name `doublure.local/pin:<12 hex>` here too, the only name that the archive then carries.
    pub fn export_image(&self, name_or_id: &str, file: &Path) -> Res<(ImagePin, u64)> {
        image::export(self, name_or_id, file)
    }
    /// The local id of an image proven equal to the pin (config digest and ordered diff_ids), if it is here. On a containerd
    /// store an image that this process has not proven yet is read through once.
    pub fn find_image(&self, pin: &ImagePin) -> Res<Option<String>> {
        image::find(self, pin)
    }
    /// Recalls that an image was proven on this host before (the ledger's record): `find_image` then need not read it again.
    /// The id of an image on a containerd store is a digest of its content, so that a proof never gets old.
    pub fn recall_proof(&self, config_digest: &str, image_id: &str) {
        self.proofs().insert(config_digest.to_string(), image_id.to_string());
    }
    /// Checks an archive against the pin (config digest, each layer's digest), loads it, tags it `doublure.local/pin:<12 hex>`,
    /// makes and removes a throw-away container. Gives the local id. `IMAGE_MISMATCH`.
    pub fn import_image(&self, pin: &ImagePin, file: &Path) -> Res<String> {
        image::import(self, pin, file)
    }
    /// Makes a container from its recipe, from a local image id, with NoCopy volumes and restart policy `no`; found with our
    /// label and the same recipe: `false`; ours, never started and of another recipe: made anew; `NAME_TAKEN` otherwise.
    /// `POLICY_REFUSED` when the recipe asks for rights on this host, `VOLUME_UNKNOWN` when a volume of it is not here.
    pub fn ensure_container(&self, spec: &ContainerSpec, image_id: &str) -> Res<bool> {
        container::ensure(self, spec, image_id)
    }
    /// Whether the recipe could be made here, without making it. Errors as `ensure_container`.
    pub fn check_recipe(&self, spec: &ContainerSpec) -> Res<()> {
        recipe::check(spec)
    }
    /// Starts it; `false` when it runs already. `CONTAINER_FAILED` with dockerd's words.
    pub fn start(&self, container: &str) -> Res<bool> {
        container::start(self, container)
    }
    /// Stops it at once (SIGKILL); `false` when it does not run. For a container that must not go on.
    pub fn kill(&self, container: &str) -> Res<bool> {
        container::kill(self, container)
    }
    /// How it does.
    pub fn state(&self, container: &str) -> Res<Running> {
        container::state(self, container)
    }
    /// How it does, if there is one.
    pub fn find_state(&self, container: &str) -> Res<Option<Running>> {
        container::find_state(self, container)
    }
    /// Waits until it is healthy (running, without a health check). `CONTAINER_FAILED` with dockerd's words.
    pub fn await_health(&self, container: &str, patience: Duration) -> Res<Duration> {
        container::await_health(self, container, patience)
    }

    fn wait<T>(
        &self,
        thing: &str,
        patience: Duration,
        future: impl Future<Output = Result<T, bollard::errors::Error>>,
    ) -> Res<T> {
        call::wait(&self.runtime, thing, patience, future)
    }
    fn proofs(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, String>> {
        // What is in the map is true at every moment, also when a thread died with the lock.
        self.proven.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
