//! User-defined networks of a container: captured with it, made again where they are missing. A network from the peer gets no
//! rights either: plain bridges in private address ranges, under options that cannot reach another bridge of this host.

use crate::docker::Docker;
use crate::docker::call;
use crate::docker::recipe::LABEL_RECIPE;
use crate::model::{Code, Fault, Res, check_name};
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// Where a captured container keeps the definitions of its networks, beside what `docker inspect` says.
pub(super) const KEY: &str = "DoublureNetworks";

/// Options of the bridge driver that concern the new bridge alone.
const OPTIONS: &[&str] = &[
    "com.docker.network.bridge.enable_icc",
    "com.docker.network.bridge.enable_ip_masquerade",
    "com.docker.network.bridge.inhibit_ipv4",
    "com.docker.network.driver.mtu",
    "com.docker.network.enable_ipv4",
    "com.docker.network.enable_ipv6",
];

fn thing(name: &str) -> String {
    format!("network {name}")
}

/// A network of exactly this name; dockerd also finds one by the beginning of its id.
fn look(docker: &Docker, name: &str) -> Res<Option<Value>> {
    check_name("network", name)?;
    let path = format!("/networks/{name}");
    let found =
        docker.wait(&thing(name), call::QUICK, async { call::found(call::raw(&docker.client, false, &path, None).await) })?;
    Ok(found.filter(|network| network["Name"] == name))
}

/// Puts the definitions of a container's networks into what was captured of it.
pub(super) fn capture(docker: &Docker, inspect: &mut Value) -> Res<()> {
    let names: Vec<String> = match inspect.pointer("/NetworkSettings/Networks").and_then(Value::as_object) {
        Some(networks) => networks.keys().filter(|name| !matches!(name.as_str(), "bridge" | "host" | "none")).cloned().collect(),
        None => Vec::new(),
    };
    let mut definitions = Map::new();
    for name in names {
        let Some(mut network) = look(docker, &name)? else { continue };
        if let Some(members) = network.as_object_mut() {
            // What changes while it is used is no part of the definition.
            ["Containers", "Created", "Id", "Peers", "Services", "Status"].iter().for_each(|key| drop(members.remove(*key)));
        }
        definitions.insert(name, network);
    }
    inspect[KEY] = Value::Object(definitions);
    Ok(())
}

/// Finds the network or makes it from its definition. `DOCKER_ERROR` when there is neither, `POLICY_REFUSED` when the
/// definition reaches for more than a plain bridge.
pub(super) fn ensure(docker: &Docker, name: &str, definition: Option<&Value>) -> Res<bool> {
    if look(docker, name)?.is_some() {
        return Ok(false);
    }
    let Some(definition) = definition else {
        let next = format!("make it as it is on the primary (docker network create {name}, with the same subnet)");
        return Err(Fault::new(
            Code::DockerError,
            thing(name),
            "it is not on this host, and its definition was not captured",
            next,
        ));
    };
    let body = body(name, definition)?;
    let answer = docker
        .wait(&thing(name), call::QUICK, async { Ok(call::raw(&docker.client, true, "/networks/create", Some(&body)).await) })?;
    answer.map(|_| true).map_err(|error| call::fault(&thing(name), &error, &[]))
}

/// The body of the create call.
fn body(name: &str, definition: &Value) -> Res<Value> {
    let refuse = |what: &str| {
        let next = format!("make it on this host by hand (docker network create {name}) if it is to be so");
        Err(Fault::new(Code::PolicyRefused, thing(name), format!("its definition asks for {what}"), next))
    };
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let on = |key: &str| definition.get(key).and_then(Value::as_bool).unwrap_or(false);
    if text(definition, "Driver") != "bridge" || !matches!(text(definition, "Scope").as_str(), "" | "local") || on("Ingress") {
        return refuse("a driver other than bridge");
    }
    for (key, _) in definition["Options"].as_object().into_iter().flatten() {
        if !OPTIONS.contains(&key.as_str()) {
            return refuse(&format!("the option {:?}", key.chars().take(80).collect::<String>()));
        }
    }
    let ipam = &definition["IPAM"];
    if !matches!(text(ipam, "Driver").as_str(), "" | "default")
        || ipam["Options"].as_object().is_some_and(|options| !options.is_empty())
    {
        return refuse("an address driver of its own");
    }
    let pools = ipam["Config"].as_array().cloned().unwrap_or_default();
    if !pools.iter().all(|pool| is_private(&text(pool, "Subnet"))) {
        // A route to somebody else's addresses would take this host's own traffic there.
        return refuse("a subnet outside the private address ranges");
    }
    let mut labels = definition["Labels"].as_object().cloned().unwrap_or_default();
    labels.retain(|label, _| !label.starts_with("doublure."));
    labels.insert(LABEL_RECIPE.into(), json!("network"));
    Ok(json!({
        "Name": name, "CheckDuplicate": true, "Driver": "bridge", "EnableIPv6": on("EnableIPv6"), "Internal": on("Internal"),
        "Attachable": on("Attachable"), "IPAM": {"Driver": "default", "Config": pools}, "Options": definition["Options"], "Labels": labels,
    }))
}

/// Whether a subnet, as `address/bits`, lies in a range that nobody routes in public.
fn is_private(subnet: &str) -> bool {
    let Some((address, bits)) = subnet.split_once('/') else { return false };
    let (Ok(address), Ok(bits)) = (address.parse::<IpAddr>(), bits.parse::<u8>()) else { return false };
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let least = match (a, b) {
                (10, _) => 8,
                (172, 16..=31) => 12,
                (192, 168) => 16,
                (100, 64..=127) => 10,
                _ => return false,
            };
            (least..=32).contains(&bits)
        }
        IpAddr::V6(v6) => v6.octets()[0] & 0xfe == 0xfc && (7..=128).contains(&bits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Value {
        json!({"Name": "shop", "Driver": "bridge", "Scope": "local", "IPAM": {"Driver": "default", "Config": [{"Subnet": "10.7.0.0/24",
            "Gateway": "10.7.0.1"}]}, "Options": {"com.docker.network.driver.mtu": "1400"}, "Internal": true,
            "Labels": {"com.docker.compose.network": "shop", "doublure.recipe": "x"}})
    }

    #[test]
    fn a_plain_bridge_is_made_as_it_was() {
        let body = body("shop", &definition()).unwrap();
        assert_eq!(body["IPAM"]["Config"][0]["Subnet"], "10.7.0.0/24");
        assert_eq!((&body["Internal"], &body["Attachable"]), (&json!(true), &json!(false)));
        assert_eq!(body["Labels"], json!({"com.docker.compose.network": "shop", LABEL_RECIPE: "network"}));
    }

    #[test]
    fn what_reaches_further_is_refused() {
        let cases = [
            ("/Driver", json!("macvlan")),
            ("/Scope", json!("swarm")),
            ("/Options", json!({"com.docker.network.bridge.name": "docker0"})),
            ("/Options", json!({"parent": "eth0"})),
            ("/IPAM", json!({"Driver": "evil"})),
            ("/IPAM", json!({"Config": [{"Subnet": "8.8.8.0/24"}]})),
            ("/IPAM", json!({"Config": [{"Subnet": "10.0.0.0/7"}]})),
            ("/IPAM", json!({"Config": [{"Gateway": "10.0.0.1"}]})),
        ];
        for (path, value) in cases {
            let mut definition = definition();
            definition[&path[1..]] = value.clone();
            assert_eq!(body("shop", &definition).unwrap_err().code, Code::PolicyRefused, "{path} {value}");
        }
    }

    #[test]
    fn private_ranges_are_private_as_a_whole() {
        for good in ["10.0.0.0/8", "172.16.0.0/12", "172.31.255.0/24", "192.168.4.0/22", "100.64.0.0/10", "fd00:1::/64"] {
            assert!(is_private(good), "{good}");
        }
        for bad in [
            "",
            "10.0.0.0",
            "172.32.0.0/16",
            "172.16.0.0/11",
            "192.168.0.0/15",
            "2001:db8::/64",
            "fc00::/6",
            "x/8",
            "10.0.0.0/33",
        ] {
            assert!(!is_private(bad), "{bad}");
        }
    }
}
