//! Images: declared with their parts, each part taken in by the node that got the upload.
//!
//! The upload is verified before the first command about it, so that a broken one leaves nothing behind.

use std::collections::BTreeMap;

use super::{Applied, check_free, check_name, conflict, invalid, not_found, storage, tasks};
use crate::state::{
    BootFile, ClusterState, Goal, Image, ImageId, ImagePart, ImageSource, NodeId, PartState, Refusal,
    Severity, Subject, TaskError, TaskId, Timestamp, VolumeFill, VolumeOwner, command::NewVolume,
};

/// Longest kernel command line that x86 kernels take.
pub(super) const MAX_CMDLINE: usize = 2047;

pub(super) fn check_cmdline(cmdline: &str) -> Result<(), Refusal> {
    if cmdline.len() > MAX_CMDLINE || !cmdline.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(invalid(
            "the kernel command line is too long or has characters that are not printable ASCII",
            format!("use at most {MAX_CMDLINE} printable characters"),
        ));
    }
    Ok(())
}

pub(super) fn create(
    state: &mut ClusterState,
    id: ImageId,
    name: &str,
    cmdline: &str,
    parts: &[ImagePart],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let done = Applied::now("image create", Subject::Image(id), name);
    if state.images.contains_key(&id) {
        return Ok(done);
    }
    check_name("image", name)?;
    check_free("image", name, state.images.values().map(|image| &image.name))?;
    check_cmdline(cmdline)?;
    if parts.is_empty() {
        return Err(invalid("an image needs at least one part", "give a kernel, an initramfs or a disk"));
    }
    let parts: BTreeMap<_, _> = parts.iter().map(|part| (*part, PartState::Awaiting)).collect();
    let image = Image { id, name: name.to_owned(), cmdline: cmdline.to_owned(), parts, created: at };
    state.images.insert(id, image);
    Ok(done)
}

fn has_or_gets(name: &str, part: ImagePart) -> Refusal {
    conflict(
        format!("image {name} has its {} already, or gets it now", part.name()),
        format!("see it: hci image get {name}"),
    )
}

fn not_declared(name: &str, part: ImagePart) -> Refusal {
    invalid(
        format!("image {name} was declared without a {}", part.name()),
        "delete the image and create it with this part",
    )
}

pub(super) fn fetch_part(
    state: &mut ClusterState,
    task: Option<TaskId>,
    id: ImageId,
    part: ImagePart,
    node: NodeId,
    source: &ImageSource,
) -> Result<Applied, Refusal> {
    if !state.nodes.contains_key(&node) {
        return Err(not_found("node", node));
    }
    let image = state.images.get_mut(&id).ok_or_else(|| not_found("image", id))?;
    let name = image.name.clone();
    match image.parts.get_mut(&part) {
        None => Err(not_declared(&name, part)),
        Some(now @ PartState::Awaiting) => {
            *now = PartState::Fetching { node, source: source.clone(), task };
            let done = Applied::now("image import", Subject::Image(id), &name);
            Ok(done.until(Goal::ImagePartReady(id, part)))
        }
        Some(_) => Err(has_or_gets(&name, part)),
    }
}

#[allow(clippy::too_many_arguments)] // the fields of one command
pub(super) fn begin_part(
    state: &mut ClusterState,
    task: Option<TaskId>,
    id: ImageId,
    part: ImagePart,
    node: NodeId,
    volume: Option<&NewVolume>,
    file: Option<BootFile>,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let image = state.images.get(&id).ok_or_else(|| not_found("image", id))?;
    let name = image.name.clone();
    let done = Applied::now("image import", Subject::Image(id), &name).until(Goal::ImagePartReady(id, part));
    let task = match image.parts.get(&part) {
        None => return Err(not_declared(&name, part)),
        Some(PartState::Awaiting) => task,
        // The task that began with the fetch goes on.
        Some(PartState::Fetching { node: owner, task, .. }) if *owner == node => *task,
        Some(_) => return Err(has_or_gets(&name, part)),
    };
    let importing = match (part, volume, file) {
        (ImagePart::Disk, Some(new), None) => {
            let mut volume = storage::plan_volume(
                state,
                new,
                Some(node),
                unreachable,
                VolumeOwner::Image(id),
                VolumeFill::Import,
                at,
            )?;
            volume.coordinator = Some(node);
            volume.generation.0 = 1;
            let volume_id = volume.id;
            state.volumes.insert(volume_id, volume);
            PartState::Importing { node, volume: Some(volume_id), file: None, task }
        }
        (ImagePart::Kernel | ImagePart::Initramfs, None, Some(file)) => {
            PartState::Importing { node, volume: None, file: Some(file), task }
        }
        _ => return Err(invalid("a disk comes with a volume, a boot file with its hash", "import it again")),
    };
    if let Some(image) = state.images.get_mut(&id) {
        image.parts.insert(part, importing);
    }
    Ok(done)
}

pub(super) fn complete_part(
    state: &mut ClusterState,
    id: ImageId,
    part: ImagePart,
    node: NodeId,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let image = state.images.get_mut(&id).ok_or_else(|| not_found("image", id))?;
    let now = match image.parts.get(&part) {
        Some(PartState::Importing { node: owner, volume: Some(volume), .. }) if *owner == node => {
            PartState::Volume(*volume)
        }
        Some(PartState::Importing { node: owner, file: Some(file), .. }) if *owner == node => {
            PartState::File(*file)
        }
        Some(PartState::File(_) | PartState::Volume(_)) => {
            return Ok(Applied::now("image part", Subject::Image(id), ""));
        }
        _ => return Err(conflict("this import is no longer wanted", "import it again")),
    };
    if let PartState::Volume(volume) = &now
        && !state.volumes.get(volume).is_some_and(|volume| volume.is_filled())
    {
        return Err(conflict("the volume is not filled yet", "finish the import first"));
    }
    image.parts.insert(part, now);
    if image.is_ready() {
        let message = format!("image {} is ready", image.name);
        state.note(at, Severity::Info, "image-ready", Subject::Image(id), message);
    }
    tasks::settle(state, &Goal::ImagePartReady(id, part), None, at);
    Ok(Applied::now("image part", Subject::Image(id), ""))
}

pub(super) fn fail_part(
    state: &mut ClusterState,
    id: ImageId,
    part: ImagePart,
    node: NodeId,
    error: &TaskError,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let image = state.images.get_mut(&id).ok_or_else(|| not_found("image", id))?;
    match image.parts.get(&part) {
        Some(PartState::Importing { node: owner, volume, .. }) if *owner == node => {
            let volume = *volume;
            image.parts.insert(part, PartState::Awaiting);
            if let Some(volume) = volume {
                storage::drop_volume(state, volume);
            }
            tasks::settle(state, &Goal::ImagePartReady(id, part), Some(error), at);
            Ok(Applied::now("image part", Subject::Image(id), ""))
        }
        Some(PartState::Fetching { node: owner, .. }) if *owner == node => {
            image.parts.insert(part, PartState::Awaiting);
            tasks::settle(state, &Goal::ImagePartReady(id, part), Some(error), at);
            Ok(Applied::now("image part", Subject::Image(id), ""))
        }
        _ => Err(conflict("this import is no longer wanted", "import it again")),
    }
}

pub(super) fn delete(state: &mut ClusterState, id: ImageId, at: Timestamp) -> Result<Applied, Refusal> {
    let image = state.images.get(&id).ok_or_else(|| not_found("image", id))?;
    let name = image.name.clone();
    if let Some(vm) = state.vms.values().find(|vm| vm.image == id) {
        return Err(conflict(
            format!("image {name} is in use by the VM {}", vm.name),
            format!("delete the VM first: hci vm delete {}", vm.name),
        ));
    }
    if image.parts.values().any(|part| matches!(part, PartState::Importing { .. })) {
        return Err(conflict(
            format!("image {name} is being imported"),
            "wait for the import: hci task list",
        ));
    }
    if let Some(volume) = image.disk() {
        storage::drop_volume(state, volume);
    }
    state.images.remove(&id);
    // A fetch ends with its image.
    let error = TaskError {
        detail: format!("image {name} was deleted"),
        next: format!("import it again: hci image import {name}"),
    };
    let is_meant = |goal: &Goal| matches!(goal, Goal::ImagePartReady(image, _) if *image == id);
    tasks::settle_where(state, is_meant, Some(&error), at);
    Ok(Applied::now("image delete", Subject::Image(id), name))
}
