//! This host's own volumes: a small registry, loop files, Docker volumes on them.

use crate::agent::Agent;
use crate::agent::group::lock;
use crate::config::Settings;
use crate::device::DeviceFile;
use crate::durable;
use crate::host;
use crate::host::LoopDevice;
use crate::model::{Code, Exit, Fault, FileSystem, Res, VolumeId, VolumeSpec, check_name};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// The volumes that were made here, in a small file that is replaced whole.
pub struct Registry {
    path: PathBuf,
    volumes: Vec<VolumeSpec>,
}

impl Registry {
    /// Reads it; nothing there = no volumes. `CORRUPT` when it cannot be read.
    pub fn load(settings: &Settings) -> Res<Registry> {
        let path = settings.state_dir.join("volumes.json");
        let volumes = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                Fault::new(
                    Code::Corrupt,
                    path.display().to_string(),
                    e.to_string(),
                    "put back a copy of it, or write `[]` and adopt the images again",
                )
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Fault::io(path.display().to_string(), &e)),
        };
        Ok(Registry { path, volumes })
    }
    /// A volume by name.
    pub fn find(&self, name: &str) -> Option<&VolumeSpec> {
        self.volumes.iter().find(|v| v.name == name)
    }
    fn change(&mut self, volumes: Vec<VolumeSpec>) -> Res<()> {
        let bytes = serde_json::to_vec_pretty(&volumes).map_err(|e| Fault::internal("the list of volumes", e.to_string()))?;
        durable::replace_file(&self.path, &bytes)?;
        self.volumes = volumes;
        Ok(())
    }
}

impl Agent {
    /// The image file of a volume or replica; named by identity, never by name.
    pub(crate) fn image_path(&self, id: VolumeId) -> PathBuf {
        self.settings.volume_dir.join(format!("{id}.img"))
    }

    pub(crate) fn link_dir(&self) -> PathBuf {
        self.settings.run_dir.join("dev")
    }

    /// Attaches a volume to serve it, and points its stable link there. Already so: nothing changes.
    pub(crate) fn attach_volume(&self, spec: &VolumeSpec) -> Res<LoopDevice> {
        let path = self.image_path(spec.id);
        if !path.exists() {
            return Err(Fault::new(
                Code::VolumeUnknown,
                format!("volume {}", spec.name),
                format!("its image {} is gone", path.display()),
                "put it back, or fail over to the standby",
            ));
        }
        let (device, fresh) = host::attach_loop(&path, false)?;
        durable::private_dir(&self.link_dir())?;
        host::point_link(&self.link_dir().join(&spec.name), &device.path)?;
        if !fresh {
            // A freezer that died with us may have left it frozen.
            for mount in host::mounts_of(device.identity.major, device.identity.minor)? {
                if host::thaw_leftover(&mount.path)? {
                    tracing::warn!(volume = %spec.name, "thawed a file system that was left frozen");
                }
            }
        }
        Ok(device)
    }

    /// Volumes that belong to no group are attached at start, so that their containers can run.
    pub(crate) fn attach_free_volumes(&self) {
        let volumes = lock(&self.volumes).volumes.clone();
        for volume in volumes {
            let owned = self.group_of_volume(volume.id);
            if owned.is_none()
                && let Err(fault) = self.attach_volume(&volume)
            {
                tracing::error!(volume = %volume.name, "{fault}");
            }
        }
    }

    pub(crate) fn group_of_volume(&self, id: VolumeId) -> Option<String> {
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        groups.into_iter().find(|g| g.record().is_ok_and(|r| r.spec.volumes.iter().any(|v| v.id == id))).map(|g| g.name.clone())
    }

    /// Makes a volume. Each step is undone when a later one fails: nothing half-made stays.
    pub(crate) fn volume_create(&self, name: &str, size_bytes: u64, fs: FileSystem, mount_options: &str) -> Res<(Value, Exit)> {
        check_name("volume", name)?;
        let (least, why) = match fs {
            FileSystem::Ext4 => (8 << 20, "ext4 with a journal"),
            FileSystem::Xfs => (300 << 20, "XFS"),
        };
        if size_bytes < least || !size_bytes.is_multiple_of(4096) || size_bytes > 1 << 50 {
            return Err(Fault::new(
                Code::BadArgument,
                format!("volume {name}"),
                format!("{size_bytes} bytes is no size for {why}"),
                format!("choose a multiple of 4096 of at least {} MiB", least >> 20),
            ));
        }
        if let Some(old) = lock(&self.volumes).find(name) {
            return match old.size_bytes == size_bytes && old.fs == fs && old.mount_options == mount_options {
                true => Ok((json!({ "name": name, "id": old.id, "changed": false }), Exit::Done)),
                false => Err(Fault::new(
                    Code::NameTaken,
                    format!("volume {name}"),
                    "it exists with another size or file system",
                    "choose another name",
                )),
            };
        }
        let docker = self.docker()?;
        if docker.volume(name)?.is_some() {
            return Err(Fault::new(
                Code::NameTaken,
                format!("volume {name}"),
                "Docker has a volume of that name which is not ours",
                "choose another name, or remove it with `docker volume rm`",
            ));
        }
        if self.link_dir().join(name).exists() {
            return Err(Fault::new(
                Code::NameTaken,
                format!("volume {name}"),
                "a replicated volume of this host has that name",
                "choose another name",
            ));
        }
        let id = crate::agent::new_id()?;
        let spec = VolumeSpec { id, name: name.into(), size_bytes, fs, mount_options: mount_options.into() };
        let path = self.image_path(id);
        drop(DeviceFile::create(&path, size_bytes)?);
        let made = self.make_volume(&spec);
        if let Err(fault) = made {
            if let Ok(devices) = host::loops_of(&path) {
                for device in devices {
                    let _ = host::detach_loop(&device, Duration::from_secs(2));
                }
            }
            let _ = durable::remove_file(&self.link_dir().join(name));
            let _ = durable::remove_file(&path);
            return Err(fault);
        }
        Ok((json!({ "name": name, "id": id, "device": self.link_dir().join(name), "image": path, "changed": true }), Exit::Done))
    }

    fn make_volume(&self, spec: &VolumeSpec) -> Res<()> {
        let device = self.attach_volume(spec)?;
        host::make_fs(&device.path, spec.fs)?;
        self.docker()?.ensure_volume(&spec.name, spec.fs, &self.link_dir().join(&spec.name), &spec.mount_options)?;
        let mut registry = lock(&self.volumes);
        let mut volumes = registry.volumes.clone();
        volumes.push(spec.clone());
        registry.change(volumes)
    }

    pub(crate) fn volume_list(&self) -> Res<(Value, Exit)> {
        let mut rows = Vec::new();
        let own = lock(&self.volumes).volumes.clone();
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        let mut seen = Vec::new();
        for group in groups {
            let record = group.record()?;
            for volume in &record.spec.volumes {
                seen.push(volume.id);
                rows.push(self.volume_row(volume, Some(&record.spec.name), Some(record.role))?);
            }
        }
        for volume in own.iter().filter(|v| !seen.contains(&v.id)) {
            rows.push(self.volume_row(volume, None, None)?);
        }
        Ok((json!({ "volumes": rows }), Exit::Done))
    }

    fn volume_row(&self, volume: &VolumeSpec, group: Option<&str>, role: Option<crate::model::Role>) -> Res<Value> {
        let path = self.image_path(volume.id);
        let device = match path.exists() {
            true => host::loops_of(&path)?.first().map(|d| d.path.display().to_string()),
            false => None,
        };
        Ok(json!({
            "name": volume.name, "id": volume.id, "size_bytes": volume.size_bytes, "fs": volume.fs,
            "device": device, "image": path, "group": group, "role": role,
        }))
    }

    /// Removes a volume and its data, on the operator's word only (S7).
    pub(crate) fn volume_remove(&self, name: &str, confirm: Option<&str>) -> Res<(Value, Exit)> {
        let Some(spec) = lock(&self.volumes).find(name).cloned() else {
            return Err(Fault::new(
                Code::VolumeUnknown,
                format!("volume {name}"),
                "this host has no such volume of its own",
                "see `doublure volume list`",
            ));
        };
        if let Some(group) = self.group_of_volume(spec.id) {
            return Err(Fault::new(
                Code::VolumeInUse,
                format!("volume {name}"),
                format!("group {group} protects it"),
                "it can be removed once no group protects it",
            ));
        }
        let docker = self.docker()?;
        let users = docker.users_of_volume(name)?;
        if !users.is_empty() {
            return Err(Fault::new(
                Code::VolumeInUse,
                format!("volume {name}"),
                format!("containers use it: {}", users.join(", ")),
                "remove these containers first",
            ));
        }
        if confirm != Some(name) {
            return Err(Fault::new(
                Code::VolumeInUse,
                format!("volume {name}"),
                format!("its {} bytes of data would be lost", spec.size_bytes),
                format!("repeat the name to confirm: doublure volume remove {name} --confirm {name}"),
            ));
        }
        let path = self.image_path(spec.id);
        docker.remove_volume(name, &self.link_dir().join(name))?;
        for device in host::loops_of(&path)? {
            host::detach_loop(&device, Duration::from_secs(5))?;
        }
        // The list first: a file without an entry is garbage that can be seen, an entry without a file is a fault at every start.
        let mut registry = lock(&self.volumes);
        let volumes = registry.volumes.iter().filter(|v| v.id != spec.id).cloned().collect();
        registry.change(volumes)?;
        durable::remove_file(&self.link_dir().join(name))?;
        durable::remove_file(&path)?;
        Ok((json!({ "name": name, "changed": true }), Exit::Done))
    }
}
