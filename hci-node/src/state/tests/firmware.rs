//! VMs that firmware boots.

use super::*;

#[test]
fn firmware_variables_are_those_of_the_current_run() {
    let (mut state, id, _) = with_vm(3, 3);
    run(&mut state, assign(id, 1, 0, &[])).unwrap();
    let epoch = state.vms[&id].assignment.expect("it runs").epoch;
    let variables = FirmwareVariables::of(&[1, 2, 3]).unwrap();
    let store = |epoch| Op::StoreVariables { vm: id, epoch, variables: variables.clone() };
    assert_eq!(refused(&mut state, store(RunEpoch(epoch.0 + 1))), RefusalKind::Conflict);
    run(&mut state, store(epoch)).unwrap();
    assert_eq!(state.vms[&id].firmware, Some(variables.clone()));
    run(&mut state, Op::VmExited { vm: id, epoch, exit: VmExit::Stopped }).unwrap();
    assert_eq!(refused(&mut state, store(epoch)), RefusalKind::Conflict, "that run is over");
    assert_eq!(state.vms[&id].firmware, Some(variables), "and what it kept is there");
}

#[test]
fn a_disk_alone_is_an_image_and_an_initramfs_is_none() {
    let mut state = cluster(3);
    let file = PartState::File(BootFile { hash: ContentHash([1; 32]), size_bytes: 1000 });
    let disk = PartState::Volume(VolumeId(id(70)));
    for (number, part, content, is_bootable) in [
        (1, ImagePart::Disk, disk, true),
        (2, ImagePart::Initramfs, file.clone(), false),
        (3, ImagePart::Kernel, file, true),
    ] {
        let image = ImageId(id(900 + number));
        let (name, cmdline, parts) = (format!("image{number}"), String::new(), vec![part]);
        run(&mut state, Op::CreateImage { image, name, cmdline, parts }).unwrap();
        state.images.get_mut(&image).unwrap().parts.insert(part, content);
        let vm = NewVm { image, ports: vec![], ..new_vm(number, vec![]) };
        let created = run(&mut state, Op::CreateVm { vm, unreachable: vec![] });
        assert_eq!(created.is_ok(), is_bootable, "{created:?}");
    }
}
