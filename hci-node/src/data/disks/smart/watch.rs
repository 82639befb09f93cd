//! Asks every disk of the pool for its SMART data now and then.
//!
//! Invariants: a disk is asked on a thread of its own where it may hang, never twice at once, and so holds up nobody but
//! itself; what a disk said counts no longer when it does not answer the next time.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use storage::ids::DiskId;
use tokio::{
    task::{Id, JoinSet},
    time::{Instant, MissedTickBehavior, interval},
};

use super::Smart;

/// How often a disk is asked.
const PERIOD: Duration = Duration::from_secs(600);
/// How often it is looked which disks are due.
const LOOK: Duration = Duration::from_secs(5);
/// A disk that has not answered by then says nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the disks said last.
#[derive(Debug, Default)]
pub struct SmartWatch {
    said: Mutex<BTreeMap<DiskId, Smart>>,
}

/// When a disk was asked last, and the task that still waits for its answer.
struct Asked {
    at: Instant,
    waiting: Option<Id>,
}

impl SmartWatch {
    /// What the disks said last; those that say nothing are not in it.
    pub fn said(&self) -> BTreeMap<DiskId, Smart> {
        self.said.lock().clone()
    }

    /// Asks the disks that `disks` names, without end.
    pub async fn run(&self, disks: impl Fn() -> BTreeMap<DiskId, PathBuf>) {
        self.run_with(disks, super::read).await;
    }

    async fn run_with(
        &self,
        disks: impl Fn() -> BTreeMap<DiskId, PathBuf>,
        read: impl Fn(&Path) -> Option<Smart> + Send + Sync + 'static,
    ) {
        let read = Arc::new(read);
        let mut asked: BTreeMap<DiskId, Asked> = BTreeMap::new();
        let mut reads = JoinSet::new();
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {
                    let disks = disks();
                    self.forget(&mut asked, &disks, Instant::now());
                    for (disk, path) in disks {
                        if asked.get(&disk).is_some_and(|asked| asked.waiting.is_some() || asked.at.elapsed() < PERIOD) {
                            continue;
                        }
                        let read = read.clone();
                        let task = reads.spawn_blocking(move || read(&path));
                        asked.insert(disk, Asked { at: Instant::now(), waiting: Some(task.id()) });
                    }
                }
                Some(answer) = reads.join_next_with_id() => {
                    let (id, smart) = match answer {
                        Ok(answer) => answer,
                        Err(error) => (error.id(), None),
                    };
                    let of = asked.iter_mut().find(|(_, asked)| asked.waiting == Some(id));
                    // The disk may have left the pool meanwhile.
                    if let Some((disk, asked)) = of {
                        asked.waiting = None;
                        self.say(*disk, smart);
                    }
                }
            }
        }
    }

    /// Forgets disks that have left, and what disks said that hang now. A disk that hangs stays among those that were
    /// asked even when it has left: it must not be asked again when it comes back.
    fn forget(&self, asked: &mut BTreeMap<DiskId, Asked>, disks: &BTreeMap<DiskId, PathBuf>, now: Instant) {
        asked.retain(|disk, asked| disks.contains_key(disk) || asked.waiting.is_some());
        let mut said = self.said.lock();
        said.retain(|disk, _| {
            let hangs = asked
                .get(disk)
                .is_some_and(|asked| asked.waiting.is_some() && now.duration_since(asked.at) > PATIENCE);
            if hangs {
                tracing::debug!(%disk, "the disk does not answer: no SMART data");
            }
            disks.contains_key(disk) && !hangs
        });
    }

    fn say(&self, disk: DiskId, smart: Option<Smart>) {
        let mut said = self.said.lock();
        match smart {
            Some(smart) => said.insert(disk, smart),
            None => said.remove(&disk),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn disk(number: u128) -> DiskId {
        DiskId(uuid::Uuid::from_u128(number))
    }

    #[tokio::test]
    async fn a_disk_that_hangs_holds_up_no_other() {
        let watch = SmartWatch::default();
        let disks = BTreeMap::from([(disk(1), PathBuf::from("hangs")), (disk(2), PathBuf::from("answers"))]);
        let (release, released) = mpsc::channel::<()>();
        let released = Mutex::new(released);
        let read = move |path: &Path| {
            if path == Path::new("hangs") {
                // Ends when the test does.
                let _ = released.lock().recv();
                return None;
            }
            Some(Smart { media_errors: Some(7), ..Smart::default() })
        };
        let answered = async {
            while watch.said().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = watch.run_with(|| disks.clone(), read) => {}
            () = answered => {}
        }
        let said = watch.said();
        assert_eq!(said.keys().collect::<Vec<_>>(), [&disk(2)]);
        assert_eq!(said[&disk(2)].media_errors, Some(7));
        drop(release);
    }

    #[tokio::test]
    async fn what_a_disk_said_is_forgotten_when_it_hangs_or_leaves() {
        let watch = SmartWatch::default();
        let disks: BTreeMap<_, _> = (1..=3).map(|number| (disk(number), PathBuf::new())).collect();
        let task = tokio::spawn(std::future::pending::<()>());
        let mut asked: BTreeMap<_, _> =
            disks.keys().map(|disk| (*disk, Asked { at: Instant::now(), waiting: None })).collect();
        asked.get_mut(&disk(1)).unwrap().waiting = Some(task.id());
        for disk in disks.keys() {
            watch.say(*disk, Some(Smart::default()));
        }
        let start = Instant::now();
        watch.forget(&mut asked, &disks, start);
        assert_eq!(watch.said().len(), 3, "there is still time to answer");
        let later = start + PATIENCE + LOOK;
        watch.forget(&mut asked, &disks, later);
        assert_eq!(watch.said().into_keys().collect::<Vec<_>>(), [disk(2), disk(3)]);
        let left = BTreeMap::from([(disk(2), PathBuf::new())]);
        watch.forget(&mut asked, &left, later);
        assert_eq!(watch.said().into_keys().collect::<Vec<_>>(), [disk(2)]);
        assert!(asked.contains_key(&disk(1)), "nobody asks a disk again that hangs");
        task.abort();
    }
}
