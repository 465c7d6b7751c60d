//! The room's own tests, on the file system that the temporary directory is on.

use super::*;
use crate::model::Code;
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_new_file_is_allocated_in_full_private_and_zero() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    let (storage, created) = FileStorage::open_or_create(&path, 64 << 10).unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert!(created);
    assert_eq!((storage.len_bytes(), meta.len()), (64 << 10, 64 << 10));
    assert!(std::os::unix::fs::MetadataExt::blocks(&meta) * 512 >= 64 << 10, "holes would mean ENOSPC later");
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let mut all = vec![1; 64 << 10];
    storage.read_at(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary is left");
}

#[test]
fn what_was_written_is_there_when_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    let (mut storage, _) = FileStorage::open_or_create(&path, 8192).unwrap();
    storage.write_at(4096, &[7; 4096]).unwrap();
    storage.flush().unwrap();
    drop(storage);
    let (storage, created) = FileStorage::open_or_create(&path, 8192).unwrap();
    let mut back = [0; 4096];
    storage.read_at(4096, &mut back).unwrap();
    assert!(!created);
    assert_eq!(back, [7; 4096]);
}

#[test]
fn another_length_or_kind_under_the_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    FileStorage::open_or_create(&path, 8192).unwrap();
    assert_eq!(FileStorage::open_or_create(&path, 16384).unwrap_err().code, Code::IdentityChanged);
    assert_eq!(FileStorage::open_or_create(&dir.path().join("odd"), 1000).unwrap_err().code, Code::BadArgument);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(FileStorage::open_or_create(&link, 8192).is_err());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 8192);
}

#[test]
fn what_does_not_fit_on_the_disk_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let fault = FileStorage::open_or_create(&dir.path().join("huge"), 1 << 60).unwrap_err();
    assert_eq!(fault.code, Code::DiskFull);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn nothing_outside_of_the_file_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (mut storage, _) = FileStorage::open_or_create(&dir.path().join("ring"), 8192).unwrap();
    assert!(storage.write_at(8000, &[1; 512]).is_err());
    assert!(storage.read_at(u64::MAX, &mut [0; 2]).is_err());
    assert_eq!(storage.len_bytes(), 8192);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Any offset and length, aligned or not, on the real file and on the double: both are a plain array of bytes.
    #[test]
    fn storages_are_arrays_of_bytes(ops in prop::collection::vec((0u64..65536, 0usize..9000, any::<u8>()), 1..12)) {
        let dir = tempfile::tempdir().unwrap();
        let (file, _) = FileStorage::open_or_create(&dir.path().join("ring"), 65536).unwrap();
        let double = double::World::new().disk("ring", 65536);
        for mut storage in [Box::new(file) as Box<dyn Storage>, Box::new(double)] {
            let mut plain = vec![0u8; 65536];
            for (offset, len, byte) in &ops {
                let len = (*len).min(65536 - *offset as usize);
                let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
                storage.write_at(*offset, &bytes).unwrap();
                plain[*offset as usize..][..len].copy_from_slice(&bytes);
                let mut back = vec![0; len];
                storage.read_at(*offset, &mut back).unwrap();
                prop_assert_eq!(&back, &bytes);
            }
            storage.flush().unwrap();
            let mut all = vec![0; 65536];
            storage.read_at(0, &mut all).unwrap();
            prop_assert!(all == plain);
        }
    }
}

#[test]
fn a_replaced_file_is_whole_and_private_and_a_leftover_does_not_hinder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe");
    std::fs::write(dir.path().join(".recipe.new"), "half").unwrap();
    replace_file(&path, b"one").unwrap();
    replace_file(&path, b"two").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"two");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    remove_file(&path).unwrap();
    remove_file(&path).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_that_others_may_enter_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    private_dir(&path).unwrap();
    private_dir(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).unwrap();
    assert_eq!(private_dir(&path).unwrap_err().code, Code::StateDirUnsafe);
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert_eq!(private_dir(&file).unwrap_err().code, Code::StateDirUnsafe);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    assert_eq!(private_dir(&link).unwrap_err().code, Code::StateDirUnsafe);
}

#[test]
fn the_second_to_lock_is_told_who_was_first() {
    let dir = tempfile::tempdir().unwrap();
    let held = lock_dir(dir.path()).unwrap();
    let fault = lock_dir(dir.path()).unwrap_err();
    assert_eq!(fault.code, Code::StateDirHeld);
    assert!(fault.cause.contains(&std::process::id().to_string()), "{fault}");
    drop(held);
    lock_dir(dir.path()).unwrap();
}
