//! A VM is paused, suspended to a volume and resumed: with a real guest under KVM and its disk, and a VMM that is all of one but its cage.

use std::{fs, io::Read, os::unix::net::UnixStream, thread::JoinHandle};

use super::*;
use crate::{
    state::report::VmRunState,
    vmm_role::{
        self, Prepared,
        record::{self, Begin, Ended},
    },
};

#[path = "../../../../vmm/tests/guest/mod.rs"]
mod guest;
#[path = "../../../../vmm/tests/guest/letters.rs"]
mod letters;

const PATIENCE: Duration = Duration::from_secs(30);
/// Between two letters.
const PAUSE: u32 = 50_000;

/// The guest's output: each letter has to be the one after the last.
struct Console {
    stream: UnixStream,
    last: Option<u8>,
}

impl Console {
    fn attach(paths: &NodePaths, vm: VmId, last: Option<u8>) -> Self {
        let began = Instant::now();
        loop {
            match UnixStream::connect(paths.vm(vm).console()) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    return Self { stream, last };
                }
                Err(error) => assert!(began.elapsed() < PATIENCE, "there is no console: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn follow(&mut self, bytes: &[u8]) {
        for byte in bytes {
            assert_eq!(*byte as char, letters::following(self.last) as char);
            self.last = Some(*byte);
        }
    }

    fn read_some(&mut self) {
        let mut some = [0; 10];
        self.stream.read_exact(&mut some).unwrap();
        self.follow(&some);
    }

    fn read_to_the_end(mut self) -> Option<u8> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
        self.follow(&rest);
        self.last
    }
}

impl Node {
    /// Has the VM's next run here, in this process: what the reconciler starts is this test's executable, which does not know how.
    async fn run_vmm(&self, vm: VmId, epoch: RunEpoch) -> JoinHandle<Ended> {
        let expected = RunEpoch(epoch.0 - 1);
        let reason = command::AssignReason::Start;
        let op = Op::AssignVm { vm, node: self.id, expected, reason, unreachable: Vec::new() };
        self.propose(op).await;
        let paths = self.paths.vm(vm);
        let began = Instant::now();
        let run = loop {
            match record::run_file(&paths).unwrap() {
                Some(run) if run.epoch == epoch => break run,
                _ => assert!(began.elapsed() < PATIENCE, "not started: {:?}", self.reconciler.report()),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        let prepared = Prepared::take(paths, run).unwrap();
        std::thread::spawn(move || vmm_role::run_prepared(prepared))
    }

    async fn vm_is(&self, state: VmRunState) {
        let began = Instant::now();
        loop {
            let report = self.reconciler.report();
            if report.vms.iter().any(|seen| seen.state == state) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "it is not {state:?}: {report:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A VM with one disk that boots the letters.
async fn create_vm(node: &Node, root: &Path) -> VmId {
    let store = root.join("disk");
    fs::create_dir_all(&store).unwrap();
    let disk = DiskId::random();
    let path = store.display().to_string();
    node.propose(Op::AddDisk { disk, node: node.id, path, wipe: WipePolicy::Refuse, key_salt: None }).await;
    node.state_when("the disk is ready", |state| state.disks[&disk].state == DiskState::Ready).await;

    let kernel = guest::pvh_elf(&letters::code(PAUSE));
    let hash = ContentHash(*blake3::hash(&kernel).as_bytes());
    fs::create_dir_all(node.paths.boot_files()).unwrap();
    fs::write(node.paths.boot_file(hash), &kernel).unwrap();
    let image = ImageId::random();
    let parts = vec![ImagePart::Kernel];
    node.propose(Op::CreateImage { image, name: "letters".into(), cmdline: String::new(), parts }).await;
    let (part, file) = (ImagePart::Kernel, Some(BootFile { hash, size_bytes: kernel.len() as u64 }));
    let (volume, unreachable) = (None, Vec::new());
    node.propose(Op::BeginImagePart { image, part, node: node.id, volume, file, unreachable }).await;
    let complete = |state: &ClusterState| state.images[&image].is_ready();
    node.state_when("the image is ready", complete).await;

    let id = VmId::random();
    let vm = command::NewVm {
        id,
        name: "letters".to_owned(),
        vcpus: 1,
        cpu_model: vmm::CpuModel::Host,
        memory_bytes: 32 << 20,
        image,
        cmdline: None,
        disks: vec![new_volume("letters-disk0")],
        ports: Vec::new(),
        preferred_node: None,
        near: None,
        after_crash: AfterCrash::Stop,
        desired: DesiredRun::Running,
        cloud_init: None,
        growth: Default::default(),
    };
    node.propose(Op::CreateVm { vm, unreachable: Vec::new() }).await;
    id
}

async fn suspend(node: &Node, vm: VmId) -> VolumeId {
    let volume = command::NewVolume { size_bytes: 64 << 20, ..new_volume("letters-state") };
    let id = volume.id;
    node.propose(Op::SuspendVm { vm, volume, unreachable: Vec::new() }).await;
    let is_over = |state: &ClusterState| {
        state.vms[&vm].is_suspended() && state.volumes.values().all(|volume| volume.coordinator.is_none())
    };
    node.state_when("the VM is suspended and its volumes are closed", is_over).await;
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_paused_suspended_to_a_volume_and_goes_on_from_there() {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED: /dev/kvm: {error}");
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    node.start_data();
    let vm = create_vm(&node, temp.path()).await;
    let vmm = node.run_vmm(vm, RunEpoch(1)).await;
    let mut console = Console::attach(&node.paths, vm, None);
    console.read_some();

    node.propose(Op::PauseVm(vm)).await;
    node.vm_is(VmRunState::Paused).await;
    node.propose(Op::ResumeVm(vm)).await;
    node.vm_is(VmRunState::Running).await;
    console.read_some();

    let state = suspend(&node, vm).await;
    assert_eq!(vmm.join().unwrap(), Ended::Killed);
    let last = console.read_to_the_end();
    let saved = node.cluster.0.lock().vms[&vm].saved().cloned().unwrap();
    assert!(saved.bytes < 1 << 20, "a mostly empty guest is small: {saved:?}");

    // One whose state is damaged does not begin, and stays suspended.
    node.open_to_look(state).await;
    let kept = node.read(state, 4096).await;
    node.data().write(VolumeWrite { volume: state.into(), offset: 0 }, vec![7; 4096].into()).await.unwrap();
    node.data().flush(VolumeFlush { volume: state.into() }).await.unwrap();
    node.close(state).await;
    node.propose(Op::ResumeVm(vm)).await;
    let refused = node.run_vmm(vm, RunEpoch(2)).await;
    let is_suspended = |state: &ClusterState| state.vms[&vm].is_suspended();
    node.state_when("the VM is suspended still", is_suspended).await;
    assert!(matches!(refused.join().unwrap(), Ended::Crashed(why) if why.contains("damaged")));
    node.open_to_look(state).await;
    node.data().write(VolumeWrite { volume: state.into(), offset: 0 }, kept).await.unwrap();
    node.data().flush(VolumeFlush { volume: state.into() }).await.unwrap();
    node.close(state).await;

    node.propose(Op::ResumeVm(vm)).await;
    let vmm = node.run_vmm(vm, RunEpoch(3)).await;
    assert_eq!(record::run_file(&node.paths.vm(vm)).unwrap().unwrap().begin, Begin::Saved);
    let is_used = |now: &ClusterState| now.vms[&vm].suspension.is_none() && !now.volumes.contains_key(&state);
    node.state_when("the state is used up", is_used).await;
    node.vm_is(VmRunState::Running).await;
    let mut console = Console::attach(&node.paths, vm, last);
    console.read_some();

    node.propose(Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Force) }).await;
    assert_eq!(vmm.join().unwrap(), Ended::Killed);
    node.state_when("the run has ended", |state| state.vms[&vm].assignment.is_none()).await;
    node.shutdown.cancel();
    node.reconciler.stopped().await;
}
