//! What crashes and damage do to a journal.

use super::*;
use proptest::prelude::*;

type Groups = Vec<Vec<Vec<u8>>>;

fn open(dir: &Path) -> Result<(Journal, Vec<Vec<u8>>), WalError> {
    let (journal, replayed) = Journal::open(dir)?;
    Ok((journal, replayed.into_iter().flat_map(|segment| segment.records).collect()))
}

fn groups() -> impl Strategy<Value = Groups> {
    let record = prop::collection::vec(any::<u8>(), 0..24);
    prop::collection::vec(prop::collection::vec(record, 0..4), 1..6)
}

/// Writes the groups into one segment; returns its file and the length after each group.
fn write(dir: &Path, groups: &Groups) -> (PathBuf, Vec<u64>) {
    let (mut journal, _) = open(dir).unwrap();
    let lengths = groups
        .iter()
        .map(|group| {
            journal.append(group).unwrap();
            journal.active_length()
        })
        .collect();
    (path_of(dir, journal.active()), lengths)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn a_crash_at_any_byte_keeps_every_acknowledged_group(groups in groups()) {
        let dir = tempfile::tempdir().unwrap();
        let (path, lengths) = write(dir.path(), &groups);
        let bytes = fs::read(&path).unwrap();
        for length in 0..=bytes.len() {
            fs::write(&path, &bytes[..length]).unwrap();
            let whole = lengths.iter().filter(|end| **end <= length as u64).count();
            let (mut journal, records) = open(dir.path()).unwrap();
            prop_assert_eq!(&records, &groups[..whole].concat(), "cut at {}", length);
            // It goes on from there.
            journal.append(&[b"next".to_vec()]).unwrap();
            drop(journal);
            prop_assert_eq!(open(dir.path()).unwrap().1.pop().unwrap(), b"next");
        }
    }

    /// Damage is found. Only in the last group may it look like a torn write, and then nothing else is lost.
    #[test]
    fn a_flipped_bit_is_an_error_or_costs_the_last_group(groups in groups(), at in any::<prop::sample::Index>(), bit in 0..8) {
        let dir = tempfile::tempdir().unwrap();
        let (path, lengths) = write(dir.path(), &groups);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        fs::write(&path, &bytes).unwrap();
        let last_begins = lengths.len().checked_sub(2).map_or(0, |i| lengths[i]);
        match open(dir.path()) {
            Ok((_, records)) => {
                prop_assert!(at as u64 >= last_begins, "byte {} of {:?}", at, lengths);
                prop_assert_eq!(records, groups[..groups.len() - 1].concat());
            }
            Err(error) => prop_assert!(matches!(error, WalError::Corrupt { .. }), "{}", error),
        }
    }

    #[test]
    fn any_file_is_a_journal_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(path_of(dir.path(), SegmentId(0)), bytes).unwrap();
        let _ = open(dir.path());
    }
}

fn records(names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|name| name.as_bytes().to_vec()).collect()
}

#[test]
fn segments_replay_in_order_and_old_ones_can_go() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path()).unwrap();
    let first = journal.active();
    journal.append(&records(&["a"])).unwrap();
    journal.rotate(&records(&["checkpoint"])).unwrap();
    journal.append(&records(&["b"])).unwrap();
    assert!(matches!(open(dir.path()), Err(WalError::Locked(_))));
    drop(journal);
    let (journal, all) = open(dir.path()).unwrap();
    assert_eq!(all, records(&["a", "checkpoint", "b"]));
    journal.remove(&[first, journal.active()]).unwrap();
    drop(journal);
    assert_eq!(open(dir.path()).unwrap().1, records(&["checkpoint", "b"]));
}

#[test]
fn a_crash_while_rotating_goes_back_to_the_old_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path()).unwrap();
    journal.append(&records(&["a"])).unwrap();
    journal.rotate(&records(&["checkpoint"])).unwrap();
    let newest = path_of(dir.path(), journal.active());
    drop(journal);
    let whole = fs::read(&newest).unwrap();
    for length in 0..whole.len() {
        fs::write(&newest, &whole[..length]).unwrap();
        let (journal, all) = open(dir.path()).unwrap();
        assert_eq!(all, records(&["a"]), "cut at {length}");
        assert!(!newest.exists());
        drop(journal);
    }
    let (mut journal, _) = open(dir.path()).unwrap();
    journal.append(&records(&["b"])).unwrap();
    drop(journal);
    assert_eq!(open(dir.path()).unwrap().1, records(&["a", "b"]));
}

#[test]
fn a_missing_segment_and_damage_before_the_last_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path()).unwrap();
    let mut segments = vec![journal.active()];
    for name in ["a", "b"] {
        journal.append(&records(&[name])).unwrap();
        journal.rotate(&records(&["checkpoint"])).unwrap();
        segments.push(journal.active());
    }
    drop(journal);
    let first = path_of(dir.path(), segments[0]);
    let bytes = fs::read(&first).unwrap();
    fs::write(&first, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(open(dir.path()), Err(WalError::Corrupt { .. })));
    fs::write(&first, bytes).unwrap();
    open(dir.path()).unwrap();
    fs::remove_file(path_of(dir.path(), segments[1])).unwrap();
    assert!(matches!(open(dir.path()), Err(WalError::Corrupt { .. })));
}
