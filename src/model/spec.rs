//! What a group is made of: volumes, containers and pinned images. The primary tells it, the standby keeps it.

use crate::model::blocks::BLOCK_BYTES;
use crate::model::ids::{GroupId, VolumeId};
use serde::{Deserialize, Serialize};

/// What this host is to a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Serves the group and ships its changes.
    Primary,
    /// Keeps the replica.
    Standby,
    /// Has raised the epoch and is on its way to serving.
    Promoting,
    /// Was primary, has seen a higher epoch, serves nothing.
    Fenced,
}

/// The file system on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FileSystem {
    /// The name that mount(2) knows.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        }
    }
}

/// One replicated volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Its identity on both hosts; names its files.
    pub id: VolumeId,
    /// The Docker volume's name.
    pub name: String,
    /// Size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// The file system on it.
    pub fs: FileSystem,
    /// Mount options for Docker's local driver (its `o=`), empty for none.
    #[serde(default)]
    pub mount_options: String,
}

impl VolumeSpec {
    /// Number of blocks, the last one possibly short.
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES)
    }
}

/// The identity of an image that survives both image stores and save/load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePin {
    /// `sha256:...` of the image's configuration.
    pub config_digest: String,
    /// `sha256:...` of each uncompressed layer, lowest first.
    pub diff_ids: Vec<String>,
    /// The name that people know it by.
    pub name: String,
}

/// One container of the group, as captured on the primary. Its `Debug` leaves the recipe out: it may hold secrets.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: ImagePin,
    /// What `docker inspect` says of it, raw. May hold secrets: never printed, never logged.
    pub inspect: serde_json::Value,
}

impl std::fmt::Debug for ContainerSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ContainerSpec").field("name", &self.name).field("image", &self.image).finish_non_exhaustive()
    }
}

/// A consistency group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// Its identity on both hosts.
    pub id: GroupId,
    /// Its name.
    pub name: String,
    /// Its volumes; the index in this list is the volume number on the wire and in the journal.
    pub volumes: Vec<VolumeSpec>,
    /// Its containers, in the order in which they start.
    pub containers: Vec<ContainerSpec>,
}

/// How block images are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// io_uring where the kernel lets us, else pread.
    Auto,
    /// io_uring or fail.
    IoUring,
    /// pread/pwrite.
    Pread,
}
