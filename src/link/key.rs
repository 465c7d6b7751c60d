//! This host's private key, and the fingerprint by which others know it.

use crate::link::tls;
use crate::model::{Code, Fault, Res};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::sign::CertifiedKey;

/// The name of the key's file.
const KEY_FILE: &str = "key.der";
/// An Ed25519 key in PKCS #8 is some 80 bytes; anything much larger is something else.
const KEY_BYTES_MAX: u64 = 4096;

/// This host's key and certificate. No Debug on purpose.
///
/// Peers pin the public key, not the certificate, so only the key is stored; the certificate that TLS wants around it is
/// made anew at each start. One file less that could be lost, expire or disagree with the other.
pub struct HostKey {
    certified: Arc<CertifiedKey>,
    fingerprint: String,
}

impl HostKey {
    /// Loads `key.der` from a private directory (0700), or makes both (the file 0600).
    ///
    /// Errors: `STATE_DIR_UNSAFE` when others could have read or put the key, `CORRUPT` when it is not a key, `IO_ERROR`.
    pub fn load_or_make(dir: &Path, host: &str) -> Res<HostKey> {
        private_dir(dir)?;
        let path = dir.join(KEY_FILE);
        let stored = match read_private(&path)? {
            Some(bytes) => bytes,
            None => make(dir, &path)?,
        };
        let broken = || {
            Fault::new(
                Code::Corrupt,
                format!("key file {}", path.display()),
                "it does not hold an Ed25519 key in PKCS #8",
                "put it back from a backup, or remove it and pair again",
            )
        };
        let der = PrivatePkcs8KeyDer::from(stored);
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ED25519).map_err(|_| broken())?;
        // The certificate is only an envelope: nobody checks its names or dates, but a person with a packet dump reads them.
        let certificate = rcgen::CertificateParams::new(vec![])
            .map(|mut params| {
                params.distinguished_name = rcgen::DistinguishedName::new();
                params.distinguished_name.push(rcgen::DnType::CommonName, host);
                params
            })
            .and_then(|params| params.self_signed(&pair))
            .map_err(|error| Fault::internal("the certificate of this host", error.to_string()))?;
        let certificate: CertificateDer<'static> = certificate.der().clone();
        let fingerprint = tls::fingerprint(&certificate)
            .map_err(|error| Fault::internal("the certificate of this host", error.to_string()))?
            .to_hex()
            .to_string();
        let certified =
            CertifiedKey::from_der(vec![certificate], PrivateKeyDer::Pkcs8(der), &tls::provider()).map_err(|_| broken())?;
        Ok(HostKey { certified: Arc::new(certified), fingerprint })
    }

    /// blake3 of the public key info, hexadecimal.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    /// What TLS signs with.
    pub(in crate::link) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

/// Makes the directory, or checks that nobody else can look into it.
fn private_dir(dir: &Path) -> Res<()> {
    let thing = || format!("key directory {}", dir.display());
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return sync_dir(dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Fault::io(thing(), &error)),
    }
    let meta = std::fs::symlink_metadata(dir).map_err(|error| Fault::io(thing(), &error))?;
    match meta.is_dir() && meta.uid() == nix::unistd::geteuid().as_raw() && meta.mode() & 0o077 == 0 {
        true => Ok(()),
        false => Err(Fault::new(
            Code::StateDirUnsafe,
            thing(),
            "it is not a directory of the agent's own user with mode 0700",
            "correct its owner and mode, and pair again if others could read it",
        )),
    }
}

/// The bytes of a file that only we can read; `None` when there is none.
fn read_private(path: &Path) -> Res<Option<Vec<u8>>> {
    let thing = || format!("key file {}", path.display());
    let mut file = match OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Fault::io(thing(), &error)),
    };
    let meta = file.metadata().map_err(|error| Fault::io(thing(), &error))?;
    if !meta.is_file() || meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o077 != 0 || meta.len() > KEY_BYTES_MAX
    {
        return Err(Fault::new(
            Code::StateDirUnsafe,
            thing(),
            "it is not a small file of the agent's own user with mode 0600",
            "correct its owner and mode; if others could read it, remove it and pair again",
        ));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|error| Fault::io(thing(), &error))?;
    Ok(Some(bytes))
}

/// Makes a key and stores it so that a power cut leaves the whole key or none:
///
/// 1. write it under another name, 2. flush it, 3. rename, 4. flush the directory. Only then is it used.
fn make(dir: &Path, path: &Path) -> Res<Vec<u8>> {
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)
        .map_err(|error| Fault::internal("the key of this host", error.to_string()))?;
    let bytes = pair.serialize_der();
    let fresh = dir.join("key.der.new");
    let store = || {
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)
    };
    store().map_err(|error| Fault::io(format!("key file {}", path.display()), &error))?;
    sync_dir(dir)?;
    Ok(bytes)
}

fn sync_dir(dir: &Path) -> Res<()> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(|error| Fault::io(format!("directory {}", dir.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_and_keeps_its_fingerprint() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("keys");
        let first = HostKey::load_or_make(&dir, "paris").unwrap().fingerprint();
        assert_eq!(HostKey::load_or_make(&dir, "paris").unwrap().fingerprint(), first);
        // The certificate is remade, with another name even: the key is what counts.
        assert_eq!(HostKey::load_or_make(&dir, "lyon").unwrap().fingerprint(), first);
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o7777, 0o700);
        assert_eq!(std::fs::metadata(dir.join(KEY_FILE)).unwrap().mode() & 0o7777, 0o600);
        assert!(first.len() == 64 && first.bytes().all(|b| b.is_ascii_hexdigit()));
        let other = HostKey::load_or_make(&home.path().join("other"), "paris").unwrap().fingerprint();
        assert_ne!(other, first);
    }

    #[test]
    fn a_key_that_others_can_read_or_that_is_none_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("keys");
        HostKey::load_or_make(&dir, "paris").unwrap();
        let key = dir.join(KEY_FILE);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(HostKey::load_or_make(&dir, "paris").err().unwrap().code, Code::StateDirUnsafe);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o750)).unwrap();
        assert_eq!(HostKey::load_or_make(&dir, "paris").err().unwrap().code, Code::StateDirUnsafe);
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(&key, b"not a key").unwrap();
        let fault = HostKey::load_or_make(&dir, "paris").err().unwrap();
        assert_eq!(fault.code, Code::Corrupt);
        assert!(!fault.to_string().contains("not a key"), "an error must not quote what is in the key file");
        std::fs::remove_file(&key).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &key).unwrap();
        assert!(HostKey::load_or_make(&dir, "paris").is_err());
    }
}
