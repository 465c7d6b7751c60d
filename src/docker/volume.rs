//! Docker volumes: the `local` driver on a block device, behind a link that the agent owns.

use crate::docker::call;
use crate::docker::{Docker, DockerVolume};
use crate::model::{Code, Fault, FileSystem, Res, check_name};
use bollard::errors::Error;
use bollard::models::VolumeCreateRequest;
use bollard::query_parameters::{ListContainersOptionsBuilder, RemoveVolumeOptions};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

fn thing(name: &str) -> String {
    format!("Docker volume {name}")
}

/// The options of a volume of ours.
fn options(fs: FileSystem, device_link: &Path, mount_options: &str) -> BTreeMap<String, String> {
    let mut options =
        BTreeMap::from([("type".to_string(), fs.name().to_string()), ("device".to_string(), device_link.display().to_string())]);
    if !mount_options.is_empty() {
        options.insert("o".to_string(), mount_options.to_string());
    }
    options
}

/// Driver and options as one line for people.
fn show(volume: &DockerVolume) -> String {
    let options: Vec<String> = volume.options.iter().map(|(key, value)| format!("{key}={value}")).collect();
    match options.is_empty() {
        true => format!("driver {} without options", volume.driver),
        false => format!("driver {} with {}", volume.driver, options.join(" ")),
    }
}

pub(super) fn look(docker: &Docker, name: &str) -> Res<Option<DockerVolume>> {
    check_name("volume", name)?;
    let volume = docker.wait(&thing(name), call::QUICK, async { call::found(docker.client.inspect_volume(name).await) })?;
    Ok(volume.map(|volume| DockerVolume { driver: volume.driver, options: volume.options.into_iter().collect() }))
}

pub(super) fn ensure(docker: &Docker, name: &str, fs: FileSystem, device_link: &Path, mount_options: &str) -> Res<bool> {
    let want = DockerVolume { driver: "local".into(), options: options(fs, device_link, mount_options) };
    let compare = |have: DockerVolume| match have == want {
        true => Ok(()),
        false => Err(Fault::new(
            Code::NameTaken,
            thing(name),
            format!("it exists with {}, wanted is {}", show(&have), show(&want)),
            "rename or remove the one that exists (docker volume rm), after looking whether its data is needed",
        )),
    };
    if let Some(have) = look(docker, name)? {
        return compare(have).map(|()| false);
    }
    let request = VolumeCreateRequest {
        name: Some(name.to_string()),
        driver: Some("local".into()),
        driver_opts: Some(want.options.clone().into_iter().collect()),
        ..Default::default()
    };
    docker.wait(&thing(name), call::QUICK, docker.client.create_volume(request))?;
    // dockerd answers "created" also when somebody else was faster with other options, and keeps those.
    match look(docker, name)? {
        Some(have) => compare(have).map(|()| true),
        None => {
            Err(Fault::new(Code::DockerError, thing(name), "it was created and is not there", "see dockerd's own log for more"))
        }
    }
}

pub(super) fn remove(docker: &Docker, name: &str, device_link: &Path) -> Res<bool> {
    let Some(have) = look(docker, name)? else { return Ok(false) };
    if have.driver != "local" || have.options.get("device").map(String::as_str) != device_link.to_str() {
        let cause = format!("it is not on {} but exists with {}", device_link.display(), show(&have));
        return Err(Fault::new(Code::NameTaken, thing(name), cause, "remove it by hand if it is not needed"));
    }
    let result = docker.wait(&thing(name), call::QUICK, async {
        match docker.client.remove_volume(name, None::<RemoveVolumeOptions>).await {
            Err(Error::DockerResponseServerError { status_code: 409, .. }) => Ok(None),
            other => Ok(Some(call::found(other)?.is_some())),
        }
    })?;
    match result {
        Some(removed) => Ok(removed),
        None => {
            let users = users(docker, name)?.join(", ");
            let cause = format!("a container has it ({users})");
            Err(Fault::new(Code::VolumeInUse, thing(name), cause, "remove that container first"))
        }
    }
}

pub(super) fn users(docker: &Docker, name: &str) -> Res<Vec<String>> {
    check_name("volume", name)?;
    let filters = HashMap::from([("volume".to_string(), vec![name.to_string()])]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    let containers = docker.wait(&thing(name), call::QUICK, docker.client.list_containers(Some(options)))?;
    // The filter also matches destinations; only the name counts here.
    let uses =
        |mounts: Option<Vec<bollard::models::MountPoint>>| mounts.into_iter().flatten().any(|m| m.name.as_deref() == Some(name));
    let mut users = Vec::new();
    for container in containers {
        let names = container.names.unwrap_or_default();
        if uses(container.mounts)
            && let Some(name) = names.iter().map(|name| name.trim_start_matches('/')).find(|name| !name.contains('/'))
        {
            users.push(name.to_string());
        }
    }
    users.sort();
    Ok(users)
}
