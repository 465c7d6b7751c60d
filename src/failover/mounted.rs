//! Which device a process really sees at a path: its own table of mounts is the only truth about that.

/// Major and minor number of what is mounted at exactly `destination`, out of a process's mountinfo; of several mounts on one
/// another the last is the one that is seen.
pub(super) fn device_at(mountinfo: &str, destination: &str) -> Option<(u32, u32)> {
    let escaped = escape(destination.trim_end_matches('/'));
    let line = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some(&escaped))?;
    let (major, minor) = line.split(' ').nth(2)?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// As the kernel writes a path: space, tab, newline and backslash as a backslash and three octal digits.
fn escape(path: &str) -> String {
    let octal = |c: char| match c {
        ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", c as u32),
        c => c.to_string(),
    };
    path.chars().map(octal).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_at_exactly_that_path_counts() {
        let table = "20 1 0:30 / / rw - overlay overlay rw\n21 20 7:3 / /var/lib/data rw - ext4 /dev/x rw\n\
                     22 20 254:0 /v/_data /plain rw - ext4 /dev/vda rw\n23 21 7:9 / /var/lib/data rw - ext4 /dev/y rw\n\
                     24 20 7:4 / /with\\040space rw - xfs /dev/z rw\n";
        assert_eq!(device_at(table, "/var/lib/data"), Some((7, 9)));
        assert_eq!(device_at(table, "/var/lib/data/"), Some((7, 9)));
        assert_eq!(device_at(table, "/plain"), Some((254, 0)));
        assert_eq!(device_at(table, "/with space"), Some((7, 4)));
        assert_eq!(device_at(table, "/var/lib"), None);
        assert_eq!(device_at("garbage", "/x"), None);
    }
}
