//! The status, for people. Whatever the agent did not say is shown as unknown (S9).

use crate::cli::out::{bytes, plain, seconds, table, word};
use crate::control::{from_rfc3339, rfc3339};
use crate::model::Moment;
use serde_json::Value;

fn items<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

fn size(value: &Value) -> String {
    value.as_u64().map_or("unknown".into(), bytes)
}

fn duration(value: &Value) -> String {
    value.as_f64().map_or("unknown".into(), seconds)
}

/// `2026-08-22T10:11:12Z (1.2 s ago)`. An instant ahead of our clock is said to be just that.
fn instant(value: &Value, now: Moment) -> String {
    let Some(at) = value.as_str().and_then(from_rfc3339) else {
        return "unknown".into();
    };
    let shown = rfc3339(Moment(at.0 / 1000 * 1000)).map_or("unknown".into(), |t| t.replace(".000Z", "Z"));
    match now.0.checked_sub(at.0) {
        Some(ms) => format!("{shown} ({} ago)", seconds(ms as f64 / 1000.0)),
        None => format!("{shown} ({} ahead of this clock)", seconds((at.0 - now.0) as f64 / 1000.0)),
    }
}

fn connected(peer: &Value) -> &'static str {
    match peer["connected"].as_bool() {
        Some(true) => "connected",
        Some(false) => "NOT CONNECTED",
        None => "unknown whether connected",
    }
}

/// Which cut is in use, what it costs whoever writes, and why it is not the best one. `None` where nothing is cut (a standby).
fn cut(group: &Value) -> Option<String> {
    let mut kinds: Vec<&str> =
        items(group, "volumes").iter().filter_map(|v| v["cut"].as_str()).filter(|c| !c.is_empty()).collect();
    kinds.dedup();
    if kinds.is_empty() {
        return None;
    }
    let counters = &group["counters"];
    let ms = |key: &str| counters[key].as_f64().map_or("unknown".into(), |ms| format!("{ms:.0} ms"));
    let lag = format!("lag p99 {}, max {}", ms("lag_p99_ms"), ms("lag_max_ms"));
    let mut text = match kinds[..] {
        ["capture"] => format!("capture: no stall; {lag}"),
        ["unmounted"] => format!("unmounted: nobody to stall; {lag}"),
        _ => format!("{}: stall p99 {}, max {}; {lag}", kinds.join(" and "), ms("freeze_p99_ms"), ms("freeze_max_ms")),
    };
    if let Some(reason) = items(group, "volumes").iter().find_map(|v| v["cut_reason"].as_str()) {
        text.push_str(&format!("; not from captured writes: {}", plain(reason)));
    }
    Some(plain(&text))
}

fn position(group: &Value) -> String {
    format!("epoch {}, generation {}", word(&group["epoch"]), word(&group["generation"]))
}

/// The whole status as text; `now` is this host's clock.
pub(super) fn render(status: &Value, now: Moment) -> String {
    let mut text = format!("host {}, agent {}\n", word(&status["host"]), word(&status["agent_version"]));
    if let Some(why) = status["tracker"].as_str().filter(|t| *t != "bitmap") {
        text.push_str(&format!("degraded: tracker: {}\n", plain(why)));
    }
    let groups = items(status, "groups");
    if !status["groups"].is_array() {
        text.push_str("groups unknown\n");
    } else if groups.is_empty() {
        text.push_str("no groups: make one with `doublure protect GROUP --container NAME`\n");
    }
    for group in groups {
        text.push_str(&render_group(status, group, now));
    }
    text
}

fn render_group(status: &Value, group: &Value, now: Moment) -> String {
    let mut text = format!("\n{}: {}, {}\n", word(&group["name"]), word(&group["role"]), position(group));
    let mut line = |key: &str, value: String| text.push_str(&format!("  {key:<15} {value}\n"));
    line("recoverable to", instant(&group["recoverable_to"], now));
    let engine = if group["io_engine"].is_null() { &status["io_engine"] } else { &group["io_engine"] };
    line("rpo", format!("{}, mode {}, engine {}", duration(&group["rpo_seconds"]), word(&group["mode"]), word(engine)));
    line("peer", format!("{}, {}", word(&group["peer"]["name"]), connected(&group["peer"])));
    line("state", word(&group["state"]));
    if let Some(progress) = group.get("progress").filter(|p| p.is_object()) {
        let (done, total) = (size(&progress["done_bytes"]), size(&progress["total_bytes"]));
        line("progress", format!("{}, {done} of {total}", word(&progress["what"])));
    }
    if let Some(drill) = group.get("last_drill").filter(|d| !d.is_null()) {
        line("last drill", word(drill));
    }
    let volume = |v: &Value| {
        vec![
            word(&v["name"]),
            match v["device"].as_str() {
                Some("") => "not attached".into(),
                _ => word(&v["device"]),
            },
            size(&v["size_bytes"]),
            size(&v["dirty_bytes"]),
            word(&v["in_sync"]),
            word(&v["cut"]),
            word(&v["tracker"]), // the last column: it may be a whole sentence
        ]
    };
    if let Some(cut) = cut(group) {
        line("cut", cut);
    }
    let rows: Vec<_> = items(group, "volumes").iter().map(volume).collect();
    if !rows.is_empty() {
        text.push_str(&table("  ", &["VOLUME", "DEVICE", ">SIZE", ">DIRTY", "IN SYNC", "CUT", "TRACKER"], &rows));
    }
    let image = |i: &Value| vec![word(&i["ref"]), short(&word(&i["id"])), word(&i["on_standby"])];
    let rows: Vec<_> = items(group, "images").iter().map(image).collect();
    if !rows.is_empty() {
        text.push_str(&table("  ", &["IMAGE", "ID", "ON STANDBY"], &rows));
    }
    let containers: Vec<String> = items(group, "containers").iter().map(word).collect();
    if !containers.is_empty() {
        text.push_str(&format!("  {:<15} {}\n", "containers", containers.join(", ")));
    }
    for fault in items(group, "faults") {
        text.push_str(&format!("  degraded: {}\n", word(fault)));
    }
    text
}

/// The first twelve digits of a digest: enough for people.
fn short(id: &str) -> String {
    id.strip_prefix("sha256:").unwrap_or(id).chars().take(12).collect()
}

/// One line a group, for a log.
pub(super) fn lines(status: &Value, now: Moment) -> String {
    let at = rfc3339(now).unwrap_or("unknown".into());
    let groups = items(status, "groups");
    if groups.is_empty() {
        let known = if status["groups"].is_array() { "no groups" } else { "groups unknown" };
        return format!("{at} {} {known}\n", word(&status["host"]));
    }
    let dirty = |group: &Value| -> Option<u64> {
        let all = group["volumes"].as_array()?;
        all.iter().map(|v| v["dirty_bytes"].as_u64()).sum::<Option<u64>>()
    };
    let line = |g: &Value| {
        format!(
            "{at} {}: {}, {}, recoverable to {}, rpo {}, dirty {}, peer {} {}, state {}, faults {}\n",
            word(&g["name"]),
            word(&g["role"]),
            position(g),
            g["recoverable_to"].as_str().map_or("unknown".into(), plain),
            duration(&g["rpo_seconds"]),
            dirty(g).map_or("unknown".into(), bytes),
            word(&g["peer"]["name"]),
            connected(&g["peer"]),
            word(&g["state"]),
            g["faults"].as_array().map_or("unknown".into(), |f| f.len().to_string()),
        )
    };
    groups.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nothing_known_is_shown_as_unknown_and_never_as_fine() {
        for value in [
            json!({"groups": [{}]}),
            json!({"groups": [{"volumes": [{}], "images": [{}], "peer": 7, "recoverable_to": 12, "rpo_seconds": "x"}]}),
        ] {
            let text = render(&value, Moment(1)) + &lines(&value, Moment(1));
            assert!(text.contains("recoverable to  unknown\n"), "{text}");
            for lie in [" yes", " no\n", ", connected", "0 B", "0.0 s", "1970-01-01T00:00:00Z"] {
                assert!(!text.contains(lie), "{lie:?} in {text}");
            }
        }
        for odd in [json!(null), json!([]), json!("x"), json!({"groups": 3})] {
            assert!(render(&odd, Moment(1)).contains("host unknown"));
            assert!((render(&odd, Moment(1)) + &lines(&odd, Moment(1))).matches("groups unknown").count() == 2);
        }
    }

    #[test]
    fn the_cut_is_named_with_what_it_costs() {
        let group = |cut: &str, reason: Value| {
            json!({"volumes": [{"cut": cut, "cut_reason": reason}, {"cut": cut, "cut_reason": reason}],
                   "counters": {"lag_p99_ms": 87.4, "lag_max_ms": 1200, "freeze_p99_ms": 45.2, "freeze_max_ms": null}})
        };
        assert_eq!(cut(&group("capture", Value::Null)).unwrap(), "capture: no stall; lag p99 87 ms, max 1200 ms");
        let text = cut(&group("freeze", json!("locked\u{1b}down"))).unwrap();
        let lag = "lag p99 87 ms, max 1200 ms";
        assert_eq!(text, format!("freeze: stall p99 45 ms, max unknown; {lag}; not from captured writes: locked\u{fffd}down"));
        assert!(cut(&group("unmounted", json!("why"))).unwrap().starts_with("unmounted: nobody to stall; "));
        assert_eq!(cut(&group("", Value::Null)), None, "a standby cuts nothing");
        assert!(cut(&json!({"volumes": [{"cut": "capture"}]})).unwrap().contains("lag p99 unknown"));
    }

    #[test]
    fn an_instant_has_its_age() {
        let at = |ms| instant(&json!("2026-08-22T10:11:12.345Z"), Moment(ms));
        assert_eq!(at(1_787_393_473_345), "2026-08-22T10:11:12Z (1.0 s ago)");
        assert_eq!(at(1_787_393_472_000), "2026-08-22T10:11:12Z (0.4 s ahead of this clock)");
        assert_eq!(instant(&json!("yesterday"), Moment(5)), "unknown");
    }

    #[test]
    fn volumes_without_a_known_dirty_count_make_the_sum_unknown() {
        let value = json!({"groups": [{"volumes": [{"dirty_bytes": 4096}, {"dirty_bytes": null}]}]});
        assert!(lines(&value, Moment(1)).contains("dirty unknown"));
    }
}
