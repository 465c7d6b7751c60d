//! Owns the Docker API: volumes, containers, images, start, stop, health.
//! Gives facts as dockerd says them and identities that survive save/load.
//! Keeps secrets of recipes out of logs and errors.
//! Never learns what a block is, never removes what it did not make, never pulls.
//! Assumes the notes headed K in `kernel-notes.md`.

use crate::model::{ContainerSpec, FileSystem, ImagePin, Res};
use std::path::Path;
use std::time::Duration;

/// A connection to one dockerd. All calls block; never call them on the runtime.
pub struct Docker { _p: () }

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
    pub fn connect(_runtime: tokio::runtime::Handle, _socket: &Path) -> Res<Docker> { todo!() }
    /// A volume, if there is one.
    pub fn volume(&self, _name: &str) -> Res<Option<DockerVolume>> { todo!() }
    /// Makes a `local` volume on a device, or finds the same one (`false`); `NAME_TAKEN` when it differs.
    pub fn ensure_volume(&self, _name: &str, _fs: FileSystem, _device_link: &Path, _mount_options: &str) -> Res<bool> { todo!() }
    /// Removes a volume that we made (its device must be this link).
    pub fn remove_volume(&self, _name: &str, _device_link: &Path) -> Res<bool> { todo!() }
    /// Containers (running or not) that use a volume by name.
    pub fn users_of_volume(&self, _name: &str) -> Res<Vec<String>> { todo!() }
    /// Names of the volumes that a container mounts, and of its other mounts, as (kind, source).
    pub fn mounts_of(&self, _container: &str) -> Res<Vec<(String, String)>> { todo!() }
    /// Captures a container: raw inspect and its image's pin.
    pub fn capture(&self, _container: &str) -> Res<ContainerSpec> { todo!() }
    /// Exports an image to a file as an archive; the pin is computed from the archive itself. Returns (pin, bytes).
    pub fn export_image(&self, _name_or_id: &str, _file: &Path) -> Res<(ImagePin, u64)> { todo!() }
    /// The local id of an image proven equal to the pin (config digest and ordered diff_ids), if it is here.
    pub fn find_image(&self, _pin: &ImagePin) -> Res<Option<String>> { todo!() }
    /// Checks an archive against the pin (config digest, each layer's digest), loads it, tags it `doublure.local/pin:<12 hex>`,
    /// makes and removes a throw-away container. Gives the local id. `IMAGE_MISMATCH`.
    pub fn import_image(&self, _pin: &ImagePin, _file: &Path) -> Res<String> { todo!() }
    /// Makes a container from its recipe, from a local image id, with NoCopy volumes and restart policy `no`; found with our
    /// label and the same recipe: `false`; `NAME_TAKEN` otherwise.
    pub fn ensure_container(&self, _spec: &ContainerSpec, _image_id: &str) -> Res<bool> { todo!() }
    /// Starts it; `false` when it runs already.
    pub fn start(&self, _container: &str) -> Res<bool> { todo!() }
    /// How it does.
    pub fn state(&self, _container: &str) -> Res<Running> { todo!() }
    /// Waits until it is healthy (running, without a health check). `CONTAINER_FAILED` with dockerd's words.
    pub fn await_health(&self, _container: &str, _patience: Duration) -> Res<Duration> { todo!() }
}
