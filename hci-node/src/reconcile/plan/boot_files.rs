//! Plans which kernels and initramfs this node holds: all that some image has, so that any node can start any VM
//! whichever other node is down.
//!
//! The node that took the upload has the file first; the others fetch it, from that node or from any that has it
//! already. The image is declared complete when every node that is there holds it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, View, lost_nodes};
use crate::state::{BootFile, ContentHash, NodeId, PartState};

/// Plans fetching, spreading and removing.
pub fn plan(view: View<'_>, actions: &mut Vec<Action>) {
    let held = &view.observed.boot_files;
    let lost = lost_nodes(view.state);
    let others: Vec<NodeId> =
        view.state.nodes.keys().copied().filter(|node| *node != view.me && !lost.contains(node)).collect();
    let mut wanted: BTreeMap<ContentHash, (BootFile, Option<NodeId>)> = BTreeMap::new();
    for image in view.state.images.values() {
        for (part, state) in &image.parts {
            match state {
                PartState::File(file) => {
                    wanted.entry(file.hash).or_insert((*file, None));
                }
                PartState::Importing { node, file: Some(file), .. } => {
                    wanted.insert(file.hash, (*file, Some(*node)));
                    if *node == view.me && held.contains(&file.hash) {
                        actions.push(Action::SpreadBootFile {
                            image: image.id,
                            part: *part,
                            file: *file,
                            to: others.clone(),
                        });
                    }
                }
                PartState::Awaiting
                | PartState::Fetching { .. }
                | PartState::Volume(_)
                | PartState::Importing { file: None, .. } => {}
            }
        }
    }
    for (hash, (file, first)) in &wanted {
        if !held.contains(hash) && *first != Some(view.me) {
            let mut from = others.clone();
            from.sort_by_key(|node| Some(*node) != *first);
            actions.push(Action::FetchBootFile { file: *file, from });
        }
    }
    let unwanted: BTreeSet<_> = held.iter().filter(|hash| !wanted.contains_key(hash)).collect();
    actions.extend(unwanted.into_iter().map(|hash| Action::RemoveBootFile { file: *hash }));
}
