use super::*;
use proptest::prelude::*;

fn put(store: &MetaStore, key: &[u8], value: &[u8]) {
    let mut batch = Batch::default();
    batch.put(key, value);
    store.apply(batch).unwrap();
}

#[test]
fn batches_are_kept_over_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meta");
    let store = MetaStore::open(&path).unwrap();
    put(&store, b"a/1", b"one");
    let mut batch = Batch::default();
    batch.put(b"a/2", &vec![2; MAX_VALUE]);
    batch.put(b"b/1", b"other");
    batch.remove(b"a/1");
    store.apply(batch).unwrap();
    store.commit_durable().unwrap();
    assert!(matches!(MetaStore::open_or_set_aside(&path), Err(MetaError::Locked(_))));
    drop(store);
    let store = MetaStore::open(&path).unwrap();
    assert_eq!(store.get(b"a/1").unwrap(), None);
    assert_eq!(store.scan(b"a/").unwrap(), [(b"a/2".to_vec(), vec![2; MAX_VALUE])]);
    let mut batch = Batch::default();
    batch.put(b"c", &vec![0; MAX_VALUE + 1]);
    assert!(matches!(store.apply(batch), Err(MetaError::TooLarge(_))));
}

#[test]
fn foreign_directories_are_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("precious"), "data").unwrap();
    assert!(matches!(MetaStore::open_or_set_aside(dir.path()), Err(MetaError::Foreign(_))));
    fs::write(dir.path().join(FORMAT_FILE), "another version").unwrap();
    assert!(matches!(MetaStore::open(dir.path()), Err(MetaError::Foreign(_))));
    assert_eq!(fs::read_to_string(dir.path().join("precious")).unwrap(), "data");
}

#[test]
fn a_value_that_was_not_sealed_by_us_is_found_and_the_store_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meta");
    let store = MetaStore::open(&path).unwrap();
    put(&store, b"key", b"value");
    // A value moved to another key is damage too.
    let sealed = store.db.get(b"key").unwrap().unwrap();
    store.db.insert(b"other", sealed).unwrap();
    store.commit_durable().unwrap();
    assert!(matches!(store.get(b"other"), Err(MetaError::Checksum(key)) if key == "other"));
    drop(store);
    let (store, aside) = MetaStore::open_or_set_aside(&path).unwrap();
    let aside = aside.unwrap();
    assert!(aside.reason.is_damage() && aside.path.is_dir());
    assert_eq!(store.get(b"key").unwrap(), None);
    put(&store, b"key", b"rebuilt");
    drop(store);
    let (store, aside) = MetaStore::open_or_set_aside(&path).unwrap();
    assert!(aside.is_none());
    assert_eq!(store.get(b"key").unwrap().unwrap(), b"rebuilt");
}

/// Overwrites parts of sled's file. A value is right, or absent, or the store is set aside: never wrong, never a panic.
#[test]
fn a_scribbled_database_never_returns_wrong_values() {
    let value = |i: u32| vec![i as u8; 200];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meta");
    let store = MetaStore::open(&path).unwrap();
    for i in 0..500_u32 {
        put(&store, &i.to_be_bytes(), &value(i));
    }
    store.commit_durable().unwrap();
    drop(store);
    let data = path.join(DATA_FILE);
    let pristine = fs::read(&data).unwrap();
    let mut noticed = 0;
    for part in 0..16 {
        let mut bytes = pristine.clone();
        let (from, length) = (bytes.len() / 16 * part, bytes.len() / 64);
        bytes[from..from + length].fill(0xa5);
        fs::write(&data, bytes).unwrap();
        let (store, aside) = MetaStore::open_or_set_aside(&path).unwrap();
        let values = store.scan(b"").unwrap();
        noticed += u32::from(aside.is_some() || values.len() < 500);
        for (key, read) in values {
            let i = u32::from_be_bytes(key.try_into().unwrap());
            assert_eq!(read, value(i));
        }
        drop(store);
        if let Some(aside) = aside {
            fs::remove_dir_all(&path).unwrap();
            fs::rename(aside.path, &path).unwrap();
        }
    }
    assert!(noticed > 0, "the scribbling hit nothing, so the test shows nothing");
}

proptest! {
    #[test]
    fn sealed_values_open_and_damaged_ones_do_not(key: Vec<u8>, value: Vec<u8>, at: prop::sample::Index, bit in 0..8) {
        let mut sealed = seal(&key, &value);
        prop_assert_eq!(unseal(&key, &sealed).unwrap(), &value);
        let at = at.index(sealed.len());
        sealed[at] ^= 1_u8 << bit;
        prop_assert!(unseal(&key, &sealed).is_err());
        prop_assert!(unseal(&key, &sealed[..at]).is_err() || at == 0);
    }
}
