//! Which blocks of replicas differ, and what each is to become. Pure; used by reconciliation (after an unclean close, all
//! members are equals and the highest version of each block is chosen) and by resync (the source is right).

use crate::ids::Version;
use crate::store::BlockVersion;
use std::collections::BTreeMap;

/// A run of blocks to be made equal, with one version.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Fix {
    /// First block within the segment.
    pub(crate) block: u32,
    /// Number of blocks.
    pub(crate) blocks: u32,
    /// What they become; the default stands for "never written": they become zeroes.
    pub(crate) version: Version,
    /// Which of the lists that were compared holds that version: indexes.
    pub(crate) sources: Vec<usize>,
    /// Which ones differ from it: indexes.
    pub(crate) targets: Vec<usize>,
}

/// Longest run in one fix: 1 MiB, one message.
const LONGEST: u32 = 256;

type Content = (Version, u32);

/// A never-written block; stores may or may not list one that was overwritten with "never written".
fn content(entry: Option<&BlockVersion>) -> Content {
    match entry {
        Some(e) if e.version != Version::default() => (e.version, e.crc),
        _ => (Version::default(), 0),
    }
}

/// Compares several replicas; for every block that differs the highest version present is chosen, whoever has it. As a write
/// that was acknowledged is on all of them, any choice is right for those not acknowledged; the highest one never undoes
/// an acknowledged write.
pub(crate) fn reconcile(lists: &[Vec<BlockVersion>]) -> Vec<Fix> {
    diff(lists, |contents| contents.iter().copied().max().unwrap_or_default())
}

/// Compares a source (index 0) with a target (index 1); blocks that only the target has are overwritten, too.
pub(crate) fn resync(source: Vec<BlockVersion>, target: Vec<BlockVersion>) -> Vec<Fix> {
    diff(&[source, target], |contents| contents[0])
}

fn diff(lists: &[Vec<BlockVersion>], choose: impl Fn(&[Content]) -> Content) -> Vec<Fix> {
    let mut blocks: BTreeMap<u32, Vec<Content>> = BTreeMap::new();
    for (i, list) in lists.iter().enumerate() {
        for entry in list {
            let contents = blocks.entry(entry.block).or_insert_with(|| vec![content(None); lists.len()]);
            contents[i] = content(Some(entry));
        }
    }
    let mut fixes: Vec<Fix> = Vec::new();
    for (block, contents) in blocks {
        let chosen = choose(&contents);
        let indexes = |wanted: bool| -> Vec<usize> {
            (0..contents.len()).filter(|i| (contents[*i] == chosen) == wanted).collect()
        };
        let (sources, targets) = (indexes(true), indexes(false));
        if targets.is_empty() {
            continue;
        }
        match fixes.last_mut() {
            Some(last)
                if last.block + last.blocks == block
                    && last.blocks < LONGEST
                    && last.version == chosen.0
                    && last.sources == sources
                    && last.targets == targets =>
            {
                last.blocks += 1;
            }
            _ => fixes.push(Fix { block, blocks: 1, version: chosen.0, sources, targets }),
        }
    }
    fixes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v(block: u32, sequence: u64) -> BlockVersion {
        BlockVersion { block, version: Version { generation: 1, sequence }, crc: sequence as u32 }
    }

    #[test]
    fn the_highest_version_wins_and_runs_are_joined() {
        let fixes =
            reconcile(&[vec![v(1, 5), v(2, 5), v(9, 1)], vec![v(1, 4), v(2, 4), v(9, 1)], vec![v(3, 7)]]);
        let found: Vec<_> =
            fixes.iter().map(|f| (f.block, f.blocks, f.version.sequence, f.targets.clone())).collect();
        assert_eq!(found, vec![(1, 2, 5, vec![1, 2]), (3, 1, 7, vec![0, 1]), (9, 1, 1, vec![2])]);
    }

    #[test]
    fn what_only_the_returning_replica_has_is_overwritten() {
        let fixes = resync(vec![v(1, 5)], vec![v(1, 9), v(2, 3)]);
        assert_eq!(fixes[0].version.sequence, 5);
        assert_eq!((fixes[1].block, fixes[1].version), (2, Version::default()));
        assert!(fixes.iter().all(|f| f.targets == vec![1]));
    }

    #[test]
    fn equal_versions_with_other_checksums_differ() {
        let mut odd = v(1, 5);
        odd.crc ^= 1;
        assert_eq!(resync(vec![v(1, 5)], vec![odd]).len(), 1);
        assert_eq!(reconcile(&[vec![v(1, 5)], vec![odd]]).len(), 1);
    }

    fn list() -> impl Strategy<Value = Vec<BlockVersion>> {
        proptest::collection::btree_map(0u32..600, 0u64..4, 0..500)
            .prop_map(|m| m.into_iter().map(|(b, s)| v(b, s)).collect())
    }

    proptest! {
        /// Applying the fixes makes all replicas equal, and nothing that was equal is touched.
        #[test]
        fn fixes_make_replicas_equal(lists in proptest::collection::vec(list(), 2..4)) {
            let mut maps: Vec<BTreeMap<u32, Version>> =
                lists.iter().map(|l| l.iter().map(|e| (e.block, e.version)).collect()).collect();
            for fix in reconcile(&lists) {
                prop_assert!(fix.blocks <= LONGEST && !fix.sources.is_empty());
                for target in &fix.targets {
                    for b in fix.block..fix.block + fix.blocks {
                        prop_assert!(maps[*target].get(&b).copied().unwrap_or_default() != fix.version || lists.len() > 2);
                        maps[*target].insert(b, fix.version);
                    }
                }
            }
            for m in &maps[1..] {
                prop_assert_eq!(m, &maps[0]);
            }
        }
    }
}
