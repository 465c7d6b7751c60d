//! From what `docker inspect` said on the primary to what is asked of dockerd here: a container that is the same in all that
//! matters, with no rights of its own.
//!
//! A recipe comes from the peer and carries no authority. So nothing is copied because it is there: each setting is on one of
//! the lists below (copied, dropped, refused unless empty), and a setting that stands on none of them is refused by name.

use crate::docker::archive;
use crate::model::{Code, ContainerSpec, Fault, Res, check_name};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The label that tells our containers, and which recipe they were made from.
pub(super) const LABEL_RECIPE: &str = "doublure.recipe";
/// The label that keeps the image's name as people know it.
pub(super) const LABEL_IMAGE: &str = "doublure.image";

/// Parts of `Config` that are copied.
const CONFIG_COPIED: &[&str] = &[
    "Hostname",
    "Domainname",
    "User",
    "ExposedPorts",
    "Tty",
    "OpenStdin",
    "StdinOnce",
    "Env",
    "Cmd",
    "Healthcheck",
    "Volumes",
    "WorkingDir",
    "Entrypoint",
    "NetworkDisabled",
    "Labels",
    "StopSignal",
    "StopTimeout",
    "Shell",
];
/// Parts of `Config` that say nothing here: who was attached, what the build said, what is set by us.
const CONFIG_DROPPED: &[&str] = &["AttachStdin", "AttachStdout", "AttachStderr", "ArgsEscaped", "OnBuild", "Image", "MacAddress"];
/// Parts of `HostConfig` that are copied: limits, names and ports of the container itself.
const HOST_COPIED: &[&str] = &[
    "BlkioWeight",
    "CapDrop",
    "CpuCount",
    "CpuPercent",
    "CpuPeriod",
    "CpuQuota",
    "CpuRealtimePeriod",
    "CpuRealtimeRuntime",
    "CpuShares",
    "CpusetCpus",
    "CpusetMems",
    "Dns",
    "DnsOptions",
    "DnsSearch",
    "ExtraHosts",
    "GroupAdd",
    "Init",
    "KernelMemory",
    "KernelMemoryTCP",
    "LogConfig",
    "Memory",
    "MemoryReservation",
    "MemorySwap",
    "MemorySwappiness",
    "NanoCpus",
    "OomKillDisable",
    "OomScoreAdj",
    "PidsLimit",
    "PortBindings",
    "PublishAllPorts",
    "ReadonlyRootfs",
    "ShmSize",
    "StorageOpt",
    "Sysctls",
    "Tmpfs",
    "Ulimits",
];
/// Parts of `HostConfig` that are rebuilt below or are the daemon's own defaults.
const HOST_DROPPED: &[&str] = &[
    "AutoRemove",
    "Binds",
    "CgroupnsMode",
    "ConsoleSize",
    "ContainerIDFile",
    "IOMaximumBandwidth",
    "IOMaximumIOps",
    "IpcMode",
    "Isolation",
    "Links",
    "MaskedPaths",
    "Mounts",
    "NetworkMode",
    "ReadonlyPaths",
    "RestartPolicy",
    "Runtime",
    "SecurityOpt",
    "VolumeDriver",
    "VolumesFrom",
];
/// Parts of `HostConfig` that give rights on this host, or reach into it: refused unless empty.
const HOST_REFUSED: &[(&str, &str)] = &[
    ("Annotations", "annotations for the runtime"),
    ("BlkioDeviceReadBps", "a limit on a device of the host"),
    ("BlkioDeviceReadIOps", "a limit on a device of the host"),
    ("BlkioDeviceWriteBps", "a limit on a device of the host"),
    ("BlkioDeviceWriteIOps", "a limit on a device of the host"),
    ("BlkioWeightDevice", "a limit on a device of the host"),
    ("CapAdd", "added capabilities"),
    ("Capabilities", "a set of capabilities of its own"),
    ("Cgroup", "another container's control group"),
    ("CgroupParent", "a control group of its own choice"),
    ("DeviceCgroupRules", "access to devices"),
    ("DeviceRequests", "access to devices"),
    ("Devices", "access to devices"),
    ("PidMode", "another process namespace"),
    ("Privileged", "privileged mode"),
    ("UTSMode", "another host-name namespace"),
    ("UsernsMode", "another user namespace"),
];

/// What is asked of dockerd for one container.
pub(super) struct Recipe {
    /// The body of the create call, with our labels and the digest in it.
    pub body: Value,
    /// Digest of what was asked, image included, independent of this host.
    pub digest: String,
    /// Names of the volumes that it mounts; each must exist before, or dockerd would make an empty one.
    pub volumes: Vec<String>,
    /// Networks that it needs, the first of them at create, and its endpoint settings in each.
    pub networks: Vec<(String, Value)>,
    /// Texts that must not appear in a log or error.
    pub secrets: Vec<String>,
}

/// What the build needs to know of this host.
pub(super) struct Here<'a> {
    /// The local image, proven equal to the pin.
    pub image_id: &'a str,
    /// Whether that image has an entrypoint.
    pub image_has_entrypoint: bool,
    /// Minor number of the API in use.
    pub api_minor: usize,
}

/// Whether a setting says nothing: absent, zero, off or without members.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn is_anonymous(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// One container's recipe under way.
struct Builder<'a> {
    spec: &'a ContainerSpec,
    config: &'a Value,
    host: &'a Value,
    here: Here<'a>,
}

/// Builds the recipe, or says which part of it this host's policy refuses (`POLICY_REFUSED`) or cannot make (`BAD_ARGUMENT`).
pub(super) fn build(spec: &ContainerSpec, here: Here<'_>) -> Res<Recipe> {
    check_name("container", &spec.name)?;
    let builder = Builder { spec, config: &spec.inspect["Config"], host: &spec.inspect["HostConfig"], here };
    if !builder.config.is_object() || !builder.host.is_object() {
        return Err(builder.wrong("it has no Config or no HostConfig"));
    }
    let mut body = builder.config()?;
    let (mut host, volumes) = builder.host_config()?;
    let networks = builder.networks(&mut host)?;
    body.insert("HostConfig".into(), Value::Object(host));
    if let Some((name, endpoint)) = networks.first() {
        body.insert("NetworkingConfig".into(), json!({"EndpointsConfig": {name: endpoint}}));
    }

    // The digest is taken before anything of this host goes in: the same recipe has it on every host and daemon.
    let whole = json!({"body": body, "networks": networks, "image": spec.image.config_digest});
    let digest = archive::sha256_of(canonical(&whole).as_bytes());
    let labels = body.entry("Labels").or_insert_with(|| json!({}));
    if !labels.is_object() {
        *labels = json!({});
    }
    labels[LABEL_IMAGE] = json!(spec.image.name);
    labels[LABEL_RECIPE] = json!(digest);
    body.insert("Image".into(), json!(builder.here.image_id));
    builder.mac_address(&mut body);
    Ok(Recipe { body: Value::Object(body), digest, volumes, networks, secrets: secrets(&spec.inspect) })
}

/// Whether the policy of this host would take the recipe. Errors as [`build`].
pub(super) fn check(spec: &ContainerSpec) -> Res<()> {
    build(spec, Here { image_id: "", image_has_entrypoint: false, api_minor: 0 }).map(drop)
}

/// The named volumes that a recipe mounts, as (name, destination in the container). Errors: a recipe that is refused.
pub fn volumes_of(spec: &ContainerSpec) -> Res<Vec<(String, String)>> {
    let recipe = build(spec, Here { image_id: "", image_has_entrypoint: false, api_minor: 0 })?;
    let mounts = recipe.body.pointer("/HostConfig/Mounts").and_then(Value::as_array).into_iter().flatten();
    let named = mounts.filter(|mount| !text(mount, "Source").is_empty());
    Ok(named.map(|mount| (text(mount, "Source").to_string(), text(mount, "Target").to_string())).collect())
}

impl Builder<'_> {
    fn thing(&self) -> String {
        format!("container {}", self.spec.name)
    }
    fn refuse(&self, what: &str) -> Fault {
        let next = "a recipe from the peer gets no rights on this host: run the container without it, or make it here by hand";
        Fault::new(Code::PolicyRefused, self.thing(), format!("its recipe asks for {what}"), next)
    }
    fn wrong(&self, why: &str) -> Fault {
        Fault::new(
            Code::BadArgument,
            format!("the recipe of container {}", self.spec.name),
            why,
            "capture it again with `doublure protect`",
        )
    }

    /// Copies, drops or refuses every member of an object by the lists.
    fn sift(&self, from: &Value, copied: &[&str], dropped: &[&str], refused: &[(&str, &str)]) -> Res<Map<String, Value>> {
        let mut to = Map::new();
        for (key, value) in from.as_object().into_iter().flatten() {
            if let Some((_, what)) = refused.iter().find(|(name, _)| name == key) {
                if !is_empty(value) {
                    return Err(self.refuse(what));
                }
            } else if copied.contains(&key.as_str()) {
                if !value.is_null() {
                    to.insert(key.clone(), value.clone());
                }
            } else if !dropped.contains(&key.as_str()) && !is_empty(value) {
                let key: String = key.chars().take(60).collect();
                return Err(self.refuse(&format!("the setting {key:?}, which this version does not know")));
            }
        }
        Ok(to)
    }

    fn config(&self) -> Res<Map<String, Value>> {
        let mut body = self.sift(self.config, CONFIG_COPIED, CONFIG_DROPPED, &[])?;
        // The short id is dockerd's default, not a choice: the new container gets its own.
        let id = text(&self.spec.inspect, "Id");
        if body.get("Hostname").and_then(Value::as_str).is_some_and(|name| name.len() == 12 && id.starts_with(name)) {
            body.remove("Hostname");
        }
        // `--entrypoint ""` is told as null; sent as null it would bring the image's entrypoint back.
        if self.here.image_has_entrypoint && self.config.get("Entrypoint").is_none_or(is_empty) {
            body.insert("Entrypoint".into(), json!([""]));
        }
        if let Some(labels) = body.get_mut("Labels").and_then(Value::as_object_mut) {
            labels.retain(|name, _| !name.starts_with("doublure."));
        }
        Ok(body)
    }

    fn host_config(&self) -> Res<(Map<String, Value>, Vec<String>)> {
        let mut host = self.sift(self.host, HOST_COPIED, HOST_DROPPED, HOST_REFUSED)?;
        match text(self.host, "IpcMode") {
            "" => {}
            mode @ ("private" | "shareable" | "none") => drop(host.insert("IpcMode".into(), json!(mode))),
            _ => return Err(self.refuse("another IPC namespace")),
        }
        // "host" is what dockerd on cgroup v1 says of every container: left to the daemon here.
        if text(self.host, "CgroupnsMode") == "private" {
            host.insert("CgroupnsMode".into(), json!("private"));
        }
        if !matches!(text(self.host, "Runtime"), "" | "runc" | "io.containerd.runc.v2") {
            return Err(self.refuse("a runtime other than runc"));
        }
        if !matches!(text(self.host, "Isolation"), "" | "default") || !matches!(text(self.host, "VolumeDriver"), "" | "local") {
            return Err(self.refuse("an isolation or volume driver of its own"));
        }
        // Paths that dockerd hides are its own default, and a newer daemon hides more; none hidden at all is a wish for rights.
        for key in ["MaskedPaths", "ReadonlyPaths"] {
            if self.host.get(key).and_then(Value::as_array).is_some_and(Vec::is_empty) {
                return Err(self.refuse("unmasked system paths"));
            }
        }
        let mut security = Vec::new();
        for option in items(self.host, "SecurityOpt") {
            match option.as_str().unwrap_or_default() {
                "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true" => security.push("no-new-privileges"),
                _ => return Err(self.refuse("a security option other than no-new-privileges")),
            }
        }
        if !security.is_empty() {
            host.insert("SecurityOpt".into(), json!(security));
        }
        let (mounts, volumes) = self.mounts()?;
        if !mounts.is_empty() {
            host.insert("Mounts".into(), Value::Array(mounts));
        }
        // The agent supervises: a container that comes back by itself could serve on a host that lost its role.
        host.insert("RestartPolicy".into(), json!({"Name": "no", "MaximumRetryCount": 0}));
        host.insert("AutoRemove".into(), json!(false));
        Ok((host, volumes))
    }

    /// Every named volume, however it was asked for, becomes one kind of mount with `NoCopy`: without it dockerd mounts the
    /// device, and writes to it, as soon as the container is created.
    fn mounts(&self) -> Res<(Vec<Value>, Vec<String>)> {
        let mut mounts = Vec::new();
        let mut asked: Vec<(String, String)> = Vec::new();
        for bind in items(self.host, "Binds").filter_map(Value::as_str) {
            match bind.split(':').collect::<Vec<_>>()[..] {
                [source, target, ..] if !source.starts_with('/') && !source.starts_with('.') && !source.starts_with('~') => {
                    asked.push((source.to_string(), target.to_string()));
                }
                [target] => mounts.push(json!({"Type": "volume", "Target": target})),
                _ => return Err(self.refuse("a mount of a path of the host")),
            }
        }
        let mut by_target: BTreeMap<&str, &Value> = BTreeMap::new();
        for mount in items(self.host, "Mounts") {
            let target = text(mount, "Target");
            // A driver given with the mount could bind any path of the host.
            if mount.pointer("/VolumeOptions/DriverConfig").is_some_and(|driver| !is_empty(driver)) {
                return Err(self.refuse("a volume driver of its own"));
            }
            match text(mount, "Type") {
                "volume" if text(mount, "Source").is_empty() => mounts.push(json!({"Type": "volume", "Target": target})),
                "volume" => {
                    asked.push((text(mount, "Source").to_string(), target.to_string()));
                    by_target.insert(target, mount);
                }
                "tmpfs" => {
                    let options = mount.get("TmpfsOptions").cloned().unwrap_or_default();
                    mounts.push(json!({"Type": "tmpfs", "Target": target, "TmpfsOptions": options}));
                }
                "bind" => return Err(self.refuse("a mount of a path of the host")),
                _ => return Err(self.refuse("a mount that is neither a volume nor a tmpfs")),
            }
        }

        let mut volumes = Vec::new();
        let mut made: Vec<(String, String)> = Vec::new();
        for point in items(&self.spec.inspect, "Mounts") {
            let (name, target) = (text(point, "Name"), text(point, "Destination"));
            match text(point, "Type") {
                "volume" => {}
                "tmpfs" => continue,
                "bind" => return Err(self.refuse("a mount of a path of the host")),
                _ => return Err(self.refuse("a mount that is neither a volume nor a tmpfs")),
            }
            let by_name = asked.iter().any(|(source, at)| source == name && at == target);
            if is_anonymous(name) && !by_name {
                if self.host.get("VolumesFrom").is_some_and(|from| !is_empty(from)) {
                    return Err(
                        self.wrong("it shares another container's nameless volume, which cannot be replicated: name the volume")
                    );
                }
                // Nobody named it, so nobody replicates it: dockerd makes a new one, as `docker run` would.
                continue;
            }
            check_name("volume", name)?;
            let mut options = json!({"NoCopy": true});
            if let Some(path) = by_target.get(target).and_then(|mount| mount.pointer("/VolumeOptions/Subpath")) {
                options["Subpath"] = path.clone();
            }
            let read_only = !point.get("RW").and_then(Value::as_bool).unwrap_or(true);
            mounts.push(
                json!({"Type": "volume", "Source": name, "Target": target, "ReadOnly": read_only, "VolumeOptions": options}),
            );
            made.push((name.to_string(), target.to_string()));
            volumes.push(name.to_string());
        }
        if asked.iter().any(|wish| !made.contains(wish)) {
            return Err(self.wrong("it asks for a volume that its list of mounts does not have"));
        }
        volumes.sort();
        volumes.dedup();
        mounts.sort_by(|a, b| text(a, "Target").cmp(text(b, "Target")));
        Ok((mounts, volumes))
    }

    /// Sets the network mode and gives the networks to join, the one of the mode first.
    fn networks(&self, host: &mut Map<String, Value>) -> Res<Vec<(String, Value)>> {
        let mode = text(self.host, "NetworkMode");
        match mode {
            "host" => return Err(self.refuse("the host's network")),
            _ if mode.starts_with("container:") => return Err(self.refuse("another container's network")),
            _ => {}
        }
        let mode = if matches!(mode, "" | "default") { "bridge" } else { mode };
        check_name("network", mode)?;
        host.insert("NetworkMode".into(), json!(mode));
        let links: Vec<String> = items(self.host, "Links").filter_map(Value::as_str).filter_map(plain_link).collect();
        if !links.is_empty() {
            host.insert("Links".into(), json!(links));
        }
        let mut networks = Vec::new();
        for (name, endpoint) in
            self.spec.inspect.pointer("/NetworkSettings/Networks").and_then(Value::as_object).into_iter().flatten()
        {
            if !matches!(name.as_str(), "bridge" | "none" | "default") {
                check_name("network", name)?;
                networks.push((name.clone(), self.endpoint(endpoint)));
            }
        }
        if !matches!(mode, "bridge" | "none") && !networks.iter().any(|(name, _)| name == mode) {
            networks.push((mode.to_string(), json!({})));
        }
        networks.sort_by_key(|(name, _)| (name != mode, name.clone()));
        if matches!(mode, "bridge" | "none") && !networks.is_empty() {
            return Err(self.wrong("it joins a network besides bridge or none, which is not supported: start it in that network"));
        }
        Ok(networks)
    }

    /// What was asked of an endpoint, without what dockerd assigned.
    fn endpoint(&self, from: &Value) -> Value {
        let mut to = Map::new();
        for key in ["IPAMConfig", "DriverOpts"] {
            if let Some(value) = from.get(key).filter(|value| !is_empty(value)) {
                to.insert(key.into(), value.clone());
            }
        }
        let id = text(&self.spec.inspect, "Id");
        let aliases: Vec<&str> = items(from, "Aliases")
            .filter_map(Value::as_str)
            .filter(|alias| alias.len() != 12 || !id.starts_with(alias))
            .collect();
        if !aliases.is_empty() {
            to.insert("Aliases".into(), json!(aliases));
        }
        let links: Vec<String> = items(from, "Links").filter_map(Value::as_str).filter_map(plain_link).collect();
        if !links.is_empty() {
            to.insert("Links".into(), json!(links));
        }
        Value::Object(to)
    }

    /// A hardware address that was chosen stands in the container's configuration before API 1.44, in the endpoint from then on.
    fn mac_address(&self, body: &mut Map<String, Value>) {
        let address = text(self.config, "MacAddress");
        if address.is_empty() {
            return;
        }
        let endpoints = body.get_mut("NetworkingConfig").and_then(|net| net["EndpointsConfig"].as_object_mut());
        match endpoints.and_then(|endpoints| endpoints.values_mut().next()) {
            Some(endpoint) if self.here.api_minor >= 44 => endpoint["MacAddress"] = json!(address),
            _ => drop(body.insert("MacAddress".into(), json!(address))),
        }
    }
}

/// `/target:/me/alias` as `target:alias`.
fn plain_link(link: &str) -> Option<String> {
    let (target, alias) = link.split_once(':')?;
    Some(format!("{}:{}", target.trim_start_matches('/'), alias.rsplit('/').next()?))
}

/// Texts of a container that may be secrets: values of its environment and arguments of its command, longest first so that a
/// part of one never uncovers the rest.
pub(super) fn secrets(inspect: &Value) -> Vec<String> {
    let config = &inspect["Config"];
    let values =
        items(config, "Env").filter_map(Value::as_str).filter_map(|pair| pair.split_once('=')).map(|(name, value)| match name {
            "PATH" => "",
            _ => value,
        });
    let commands = items(config, "Cmd").skip(1).chain(items(config, "Entrypoint").skip(1)).filter_map(Value::as_str);
    // dockerd quotes what it repeats: a secret with a quote or line break in it looks different then.
    let quoted = |text: &str| json!(text).to_string().trim_matches('"').to_string();
    let texts = values.chain(commands).filter(|text| text.len() >= 4);
    let mut secrets: Vec<String> = texts.flat_map(|text| [text.to_string(), quoted(text)]).collect();
    secrets.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    secrets.dedup();
    secrets
}

/// JSON with sorted keys and no spaces, whatever map serde_json was built with.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let sorted: BTreeMap<&String, &Value> = members.iter().collect();
            let inner: Vec<String> = sorted.iter().map(|(key, value)| format!("{}:{}", json!(key), canonical(value))).collect();
            format!("{{{}}}", inner.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ImagePin;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn spec(change: impl FnOnce(&mut Value)) -> ContainerSpec {
        let mut inspect = json!({
            "Id": ID,
            "Config": {"Hostname": &ID[..12], "User": "app", "Env": ["PATH=/bin", "PASSWORD=hunter2"], "Cmd": ["serve", "--key=sesame"],
                "Image": "shop/db:3", "Entrypoint": null, "AttachStdout": true, "Labels": {"com.docker.compose.project": "shop", "doublure.recipe": "old"}},
            "HostConfig": {"Binds": ["pgdata:/var/lib/data:rw"], "NetworkMode": "default", "RestartPolicy": {"Name": "always"},
                "AutoRemove": true, "Memory": 1048576, "IpcMode": "private", "CgroupnsMode": "host", "Runtime": "runc",
                "PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}, "MaskedPaths": ["/proc/kcore"], "CapAdd": null},
            "Mounts": [{"Type": "volume", "Name": "pgdata", "Source": "/x", "Destination": "/var/lib/data", "RW": true}],
            "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2"}}},
        });
        change(&mut inspect);
        let pin = ImagePin { config_digest: "sha256:aa".into(), diff_ids: vec![], name: "shop/db:3".into() };
        ContainerSpec { name: "db".into(), image: pin, inspect }
    }

    fn here(entrypoint: bool, api_minor: usize) -> Here<'static> {
        Here { image_id: "sha256:local", image_has_entrypoint: entrypoint, api_minor }
    }

    #[test]
    fn the_fix_ups_of_a_plain_container() {
        let recipe = build(&spec(|_| {}), here(true, 41)).unwrap();
        let body = &recipe.body;
        assert_eq!(body["Image"], "sha256:local");
        assert_eq!(body["Entrypoint"], json!([""]));
        assert!(body.get("Hostname").is_none() && body.get("AttachStdout").is_none());
        assert_eq!(body["HostConfig"]["RestartPolicy"]["Name"], "no");
        assert_eq!(body["HostConfig"]["AutoRemove"], false);
        assert!(body["HostConfig"].get("Binds").is_none() && body["HostConfig"].get("MaskedPaths").is_none());
        let mount = &body["HostConfig"]["Mounts"][0];
        assert_eq!(mount["VolumeOptions"]["NoCopy"], true);
        assert_eq!((mount["Source"].as_str(), mount["Target"].as_str()), (Some("pgdata"), Some("/var/lib/data")));
        assert_eq!(body["HostConfig"]["Memory"], 1048576);
        assert_eq!(body["Labels"][LABEL_IMAGE], "shop/db:3");
        assert_eq!(body["Labels"][LABEL_RECIPE], json!(recipe.digest));
        assert_eq!(body["Labels"]["com.docker.compose.project"], "shop");
        assert_eq!(recipe.volumes, vec!["pgdata"]);
        assert!(recipe.networks.is_empty());
    }

    #[test]
    fn the_digest_is_of_the_recipe_and_not_of_the_host() {
        let one = build(&spec(|_| {}), here(false, 41)).unwrap();
        let mut other = here(false, 51);
        other.image_id = "sha256:elsewhere";
        let two = build(&spec(|i| i["Config"]["MacAddress"] = Value::Null), other).unwrap();
        assert_eq!(one.digest, two.digest);
        let three = build(&spec(|i| i["Config"]["Env"] = json!(["PASSWORD=other"])), here(false, 41)).unwrap();
        assert_ne!(one.digest, three.digest);
    }

    #[test]
    fn what_gives_rights_is_refused_and_named() {
        let cases: Vec<(&str, &str, Value)> = vec![
            ("/HostConfig/Privileged", "privileged mode", json!(true)),
            ("/HostConfig/PidMode", "process namespace", json!("host")),
            ("/HostConfig/IpcMode", "IPC namespace", json!("host")),
            ("/HostConfig/IpcMode", "IPC namespace", json!("container:x")),
            ("/HostConfig/NetworkMode", "the host's network", json!("host")),
            ("/HostConfig/NetworkMode", "another container's network", json!("container:x")),
            ("/HostConfig/UTSMode", "host-name namespace", json!("host")),
            ("/HostConfig/UsernsMode", "user namespace", json!("host")),
            ("/HostConfig/Devices", "devices", json!([{"PathOnHost": "/dev/sda"}])),
            ("/HostConfig/DeviceRequests", "devices", json!([{"Driver": "nvidia"}])),
            ("/HostConfig/DeviceCgroupRules", "devices", json!(["b *:* rwm"])),
            ("/HostConfig/CapAdd", "capabilities", json!(["SYS_ADMIN"])),
            ("/HostConfig/SecurityOpt", "security option", json!(["seccomp=unconfined"])),
            ("/HostConfig/SecurityOpt", "security option", json!(["no-new-privileges:true", "apparmor=unconfined"])),
            ("/HostConfig/Runtime", "runtime", json!("evil")),
            ("/HostConfig/CgroupParent", "control group", json!("/")),
            ("/HostConfig/MaskedPaths", "unmasked", json!([])),
            ("/HostConfig/Binds", "path of the host", json!(["/:/host"])),
            ("/HostConfig/Binds", "path of the host", json!(["./x:/host"])),
            ("/HostConfig/Mounts", "path of the host", json!([{"Type": "bind", "Source": "/etc", "Target": "/x"}])),
            ("/HostConfig/Mounts", "neither a volume", json!([{"Type": "npipe", "Source": "x", "Target": "/x"}])),
            (
                "/HostConfig/Mounts",
                "volume driver",
                json!([{"Type": "volume", "Target": "/x", "VolumeOptions": {"DriverConfig": {"Options": {"device": "/"}}}}]),
            ),
            (
                "/HostConfig/Mounts",
                "volume driver",
                json!([{"Type": "volume", "Source": "v", "Target": "/x", "VolumeOptions": {"DriverConfig": {"Options": {"device": "/"}}}}]),
            ),
            ("/Mounts", "path of the host", json!([{"Type": "bind", "Source": "/var/run/docker.sock", "Destination": "/s"}])),
            ("/HostConfig/NewPower", "\"NewPower\"", json!(1)),
            ("/Config/NewPower", "\"NewPower\"", json!({"a": 1})),
        ];
        for (path, what, value) in cases {
            let (parent, key) = path.rsplit_once('/').unwrap();
            let spec = spec(|inspect| inspect.pointer_mut(parent).unwrap()[key] = value.clone());
            let fault = build(&spec, here(false, 41)).err().unwrap_or_else(|| panic!("{path} {value} went through"));
            assert_eq!(fault.code, Code::PolicyRefused, "{path}: {fault}");
            assert!(fault.cause.contains(what), "{path}: {fault}");
            assert!(!fault.to_string().contains("hunter2"));
        }
    }

    #[test]
    fn empty_settings_that_nobody_knows_are_no_wish() {
        let spec = spec(|i| {
            i["HostConfig"]["NewPower"] = json!(null);
            i["HostConfig"]["Devices"] = json!([]);
            i["HostConfig"]["Privileged"] = json!(false);
        });
        assert!(build(&spec, here(false, 41)).is_ok());
    }

    #[test]
    fn a_recipe_that_contradicts_itself_is_refused() {
        let spec = spec(|i| i["Mounts"] = json!([]));
        assert_eq!(build(&spec, here(false, 41)).err().unwrap().code, Code::BadArgument);
    }

    #[test]
    fn a_named_network_keeps_what_was_asked_and_drops_what_was_assigned() {
        let spec = spec(|i| {
            i["HostConfig"]["NetworkMode"] = json!("shop");
            i["Config"]["MacAddress"] = json!("02:42:ac:11:00:09");
            i["NetworkSettings"]["Networks"] = json!({
                "back": {"Aliases": ["db"], "IPAddress": "10.0.0.4", "IPAMConfig": null},
                "shop": {"Aliases": ["db", &ID[..12]], "IPAMConfig": {"IPv4Address": "10.1.0.9"}, "Gateway": "10.1.0.1", "Links": ["/a:/db/b"]},
            });
        });
        let recipe = build(&spec, here(false, 44)).unwrap();
        let shop = json!({"Aliases": ["db"], "IPAMConfig": {"IPv4Address": "10.1.0.9"}, "Links": ["a:b"]});
        assert_eq!(recipe.networks[0], ("shop".to_string(), shop.clone()));
        assert_eq!(recipe.networks[1], ("back".to_string(), json!({"Aliases": ["db"]})));
        let sent = &recipe.body["NetworkingConfig"]["EndpointsConfig"];
        assert_eq!(sent.as_object().unwrap().len(), 1);
        assert_eq!(sent["shop"]["MacAddress"], "02:42:ac:11:00:09");
        let old = build(&spec, here(false, 41)).unwrap();
        assert_eq!(old.body["MacAddress"], "02:42:ac:11:00:09");
        assert_eq!(old.digest, recipe.digest);
    }

    #[test]
    fn a_nameless_volume_is_left_to_dockerd() {
        let spec = spec(|i| {
            i["Config"]["Volumes"] = json!({"/scratch": {}});
            i["Mounts"]
                .as_array_mut()
                .unwrap()
                .push(json!({"Type": "volume", "Name": ID, "Destination": "/scratch", "RW": true}));
        });
        let recipe = build(&spec, here(false, 41)).unwrap();
        assert_eq!(recipe.volumes, vec!["pgdata"]);
        assert_eq!(recipe.body["Volumes"], json!({"/scratch": {}}));
    }

    #[test]
    fn secrets_are_the_environment_and_the_arguments() {
        let found = secrets(&spec(|_| {}).inspect);
        assert_eq!(found, vec!["--key=sesame", "hunter2"]);
        let found = secrets(&spec(|i| i["Config"]["Env"] = json!(["KEY=two\nlines"])).inspect);
        assert_eq!(found, vec!["--key=sesame", "two\\nlines", "two\nlines"]);
    }
}
