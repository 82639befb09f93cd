//! Puts a guest together, runs it and takes it apart.
//!
//! The order of the end is the reverse of the beginning: vCPUs first, so that nobody touches devices; then the devices, so
//! that no backend touches memory; the console last, so that its clients see the last line.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::acpi::panic::PanicDevice;
use crate::acpi::power::{self, KeyboardController, PowerDevice};
use crate::acpi::sci::Sci;
use crate::acpi::tables::{Description, Keyboard, Tables};
use crate::boot::{self, BootError, BootSource};
use crate::bus::Bus;
use crate::chipset::cmos::Cmos;
use crate::chipset::lpc::LpcBridge;
use crate::chipset::pm_timer::PmTimer;
use crate::config::{Boot, VmConfig};
use crate::console::serial::{IrqTrigger, SerialPort};
use crate::console::server::{ConsoleServer, Output};
use crate::display::{self, DisplayServer};
use crate::error::{VmError, resource};
use crate::firmware::store::VariableStore;
use crate::firmware::{flash, fw_cfg, items};
use crate::handle::{BackendState, VmHandle};
use crate::hotplug::controller::Controller;
use crate::hotplug::maker::{self, Maker, SetUp};
use crate::hotplug::{self, Attached, Plant};
use crate::interrupts::{Gsi, Interrupts};
use crate::kvm::{self as kvm_guest, KvmGuest};
use crate::layout::{self, GIB};
use crate::lifecycle::{ExitReason, Lifecycle};
use crate::memory::{self, Backing, Memory};
use crate::pci::host_bridge::HostBridge;
use crate::pci::root::{self, ConfigPorts};
use crate::pci::{PciDevice, PciRoot, slots};
use crate::resize::Memories;
use crate::state::Devices;
use crate::transfer::{Core, TransferError};
use crate::vcpu::cpuid::Topology;
use crate::vcpu::gate::{Gate, Wanted, install_kick_handler};
use crate::vcpu::{self, VcpuContext, registers};
use crate::virtio::balloon::Balloon;
use crate::virtio::mem::Mem;
use crate::virtio::port::Port;
use crate::virtio::rng::Rng;
use crate::virtio::seed::Seed;
use crate::virtio::vhost_user::worker::{self, WorkerHandle};
use crate::virtio::vsock::Vsock;
use crate::watchdog::Watchdog;

/// Where the QEMU guest agent looks for its host.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";
/// Between complaints about vCPUs that do not stop.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// What handles need of a guest.
pub(crate) struct Machine {
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) power: Arc<PowerDevice>,
    pub(crate) hotplug: Arc<Controller>,
    /// Its disks and NICs.
    pub(crate) backends: RwLock<Vec<Attached>>,
    pub(crate) devices: Devices,
    pub(crate) memories: Memories,
    pub(crate) vcpu_threads: Mutex<Vec<JoinHandle<()>>>,
    /// What there is beside the devices, as long as the guest has not been taken apart.
    pub(crate) core: Mutex<Option<Core>>,
    /// What more parts are made with, for as long.
    pub(crate) plant: Mutex<Option<Plant>>,
}

impl Machine {
    /// The backends of its disks and NICs.
    pub(crate) fn attached(&self) -> Vec<Arc<worker::Shared>> {
        self.backends.read().iter().map(|device| device.backend.clone()).collect()
    }

    /// Refuses if a backend is away: requests may be under way there.
    pub(crate) fn check_backends(&self) -> Result<(), TransferError> {
        match self.attached().iter().find(|backend| backend.status().backend == BackendState::Waiting) {
            Some(backend) => Err(TransferError::BackendAway(backend.id().to_owned())),
            None => Ok(()),
        }
    }

    /// Has all devices keep away from guest memory. Afterwards nothing is under way, at no backend.
    pub(crate) fn hold_devices(&self) -> Result<(), TransferError> {
        let backends = self.attached();
        let reconnects =
            || -> Vec<u64> { backends.iter().map(|backend| backend.status().reconnects).collect() };
        let before = reconnects();
        self.check_backends()?;
        self.devices.hold()?;
        // One that was lost meanwhile has not said what became of its requests, even if it is back by now.
        self.check_backends()?;
        match reconnects().iter().zip(before).zip(&backends).find(|((now, before), _)| **now != *before) {
            Some((_, backend)) => Err(TransferError::BackendAway(backend.id().to_owned())),
            None => Ok(()),
        }
    }
}

/// What a guest goes on with that was another process's.
#[derive(Debug)]
pub struct Inheritance {
    /// Its memory, the memfd of [`VmHandle::memory`].
    pub memory: File,
    /// What the names of the sockets begin with that are made, until the other process has ended and they can be given their own names.
    pub socket_prefix: String,
}

/// A running guest. Dropping it kills it.
pub struct Vm {
    machine: Arc<Machine>,
    name: String,
    // Dropped in this order, by `stop`: devices (with their workers), console, display.
    pci: Option<Arc<PciRoot>>,
    console: Option<ConsoleServer>,
    display: Option<DisplayServer>,
    /// The guest's processors read it as long as they run.
    _firmware: Option<flash::Code>,
}

/// The bus with what is on it.
struct Pci {
    root: Arc<PciRoot>,
    bridge: Arc<HostBridge>,
    /// The slots of the disks.
    boot_slots: Vec<usize>,
    memories: Memories,
}

impl Vm {
    /// Makes a guest and lets it run. Returns once its first instruction may have been executed.
    pub fn start(config: VmConfig) -> Result<Self, VmError> {
        config.validate().map_err(VmError::Config)?;
        Builder::new(&config, Gate::new(), Backing::New)?.run(Origin::Boot)
    }

    /// Makes a guest that goes on where one of the same making was when [`VmHandle::save`] wrote it. It is paused, and its devices leave its
    /// memory alone, until [`VmHandle::resume`].
    pub fn restore(config: VmConfig, from: &mut dyn Read) -> Result<Self, VmError> {
        config.validate().map_err(VmError::Config)?;
        Builder::new(&config, Gate::closed(), Backing::New)?.run(Origin::Saved(from))
    }

    /// Makes a guest that goes on in the memory that another process made for it, from what [`VmHandle::save_for_successor`] wrote there. That
    /// process does not touch the memory any more. Paused as after [`Vm::restore`].
    pub fn succeed(config: VmConfig, inheritance: Inheritance, from: &mut dyn Read) -> Result<Self, VmError> {
        config.validate().map_err(VmError::Config)?;
        let Inheritance { memory, socket_prefix } = inheritance;
        let builder = Builder::new(&config, Gate::closed(), Backing::Kept(memory))?;
        Builder { socket_prefix, ..builder }.run(Origin::Saved(from))
    }

    /// A handle to control the guest.
    pub fn handle(&self) -> VmHandle {
        VmHandle { machine: self.machine.clone() }
    }

    /// Waits until the guest has ended, however long that takes, and takes it apart.
    pub fn wait(mut self) -> ExitReason {
        let reason = self.machine.lifecycle.wait();
        self.stop();
        reason
    }

    fn stop(&mut self) {
        let mut threads = self.machine.vcpu_threads.lock();
        while !self.machine.gate.set(Wanted::Stop, &threads, Instant::now() + STOP_DEADLINE) {
            tracing::error!(vm = self.name, "vCPUs do not stop; trying on");
        }
        for thread in threads.drain(..) {
            let _ = thread.join();
        }
        drop(threads);
        self.machine.plant.lock().take();
        self.machine.core.lock().take();
        self.pci.take();
        self.console.take();
        self.display.take();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.machine.lifecycle.end(ExitReason::Killed);
        self.stop();
    }
}

/// What a guest begins with.
enum Origin<'a> {
    /// What runs first is loaded.
    Boot,
    /// What it was when it was saved.
    Saved(&'a mut dyn Read),
}

/// A guest in the making.
struct Builder<'a> {
    config: &'a VmConfig,
    memory: Memory,
    kvm: KvmGuest,
    interrupts: Arc<Interrupts>,
    maker: Arc<Maker>,
    sci: Arc<Sci>,
    lifecycle: Arc<Lifecycle>,
    gate: Arc<Gate>,
    /// [`Inheritance::socket_prefix`].
    socket_prefix: String,
}

impl<'a> Builder<'a> {
    fn new(config: &'a VmConfig, gate: Gate, backing: Backing) -> Result<Self, VmError> {
        let memory = memory::map(config.memory_layout(), backing)?;
        let kvm = kvm_guest::create(&memory, config.cpu_model)?;
        let interrupts = Arc::new(Interrupts::new(kvm.vm.clone())?);
        let (lifecycle, gate) = (Arc::default(), Arc::new(gate));
        let maker = Arc::new(Maker {
            vm: kvm.vm.clone(),
            memory: memory.clone(),
            interrupts: interrupts.clone(),
            cpuid: kvm.cpuid.clone(),
            topology: Topology { vcpus: config.most_vcpus(), tsc_deadline: kvm.tsc_deadline },
            set_up: match config.boot {
                Boot::Kernel { .. } => SetUp::Vmm,
                Boot::Firmware { .. } => SetUp::Firmware,
            },
        });
        let sci = Arc::new(Sci::new(interrupts.clone()));
        let socket_prefix = String::new();
        Ok(Self { config, memory, kvm, interrupts, maker, sci, lifecycle, gate, socket_prefix })
    }

    /// Where a socket is made that is to be at this place.
    fn made_at(&self, path: &Path) -> PathBuf {
        let mut name = OsString::from(&self.socket_prefix);
        name.push(path.file_name().unwrap_or_default());
        path.with_file_name(name)
    }

    fn run(self, origin: Origin<'_>) -> Result<Vm, VmError> {
        let workers = self.connect_backends()?;
        let attached =
            |(slot, worker): &(u8, WorkerHandle)| Attached { slot: *slot, backend: worker.shared() };
        let backends = workers.iter().map(attached).collect();
        let mut ports = Bus::default();
        let mut mmio = Bus::default();
        let console = self.add_console(&mut ports)?;
        let power = self.add_power(&mut ports);
        let display = self.add_keyboard(&mut ports)?;
        let pci = self.add_pci(workers, display.as_ref(), &mut ports, &mut mmio)?;
        let hotplug =
            Arc::new(Controller::new(self.config.vcpus, self.sci.clone(), Arc::downgrade(&pci.root)));
        ports.insert(layout::HOTPLUG_PORT.into(), hotplug::registers::LEN, hotplug.clone());
        let firmware = self.add_firmware(&pci, display.as_ref(), &mut ports, &mut mmio)?;
        let display = self.serve_display(display)?;
        let entry = match origin {
            Origin::Boot => self.load()?,
            Origin::Saved(_) => None,
        };

        let (ports, mmio) = (Arc::new(ports), Arc::new(mmio));
        // Weak: handles may outlive the guest, and do not keep its devices.
        let devices = Devices {
            ports: Arc::downgrade(&ports),
            mmio: Arc::downgrade(&mmio),
            pci: Arc::downgrade(&pci.root),
        };
        let machine = Arc::new(Machine {
            lifecycle: self.lifecycle.clone(),
            gate: self.gate.clone(),
            power,
            hotplug,
            backends: RwLock::new(backends),
            devices,
            memories: pci.memories,
            vcpu_threads: Mutex::default(),
            core: Mutex::default(),
            plant: Mutex::new(Some(Plant {
                maker: self.maker.clone(),
                backend_timeout: self.config.backend_timeout(),
                max_vcpus: self.config.most_vcpus(),
                spare: None,
            })),
        });
        hotplug::take_apart_on_main_thread(&machine);
        // From here on, `Vm` takes everything apart if something fails.
        let vm = Vm {
            machine,
            name: self.config.name.clone(),
            pci: Some(pci.root),
            console: Some(console),
            display,
            _firmware: firmware,
        };
        let core = self.core(entry)?;
        self.start_vcpus(&vm, &core, ports, mmio)?;
        if let Origin::Saved(from) = origin {
            vm.machine.devices.hold().map_err(TransferError::from)?;
            core.restore(&vm.machine.devices, from)?;
        }
        *vm.machine.core.lock() = Some(core);
        tracing::info!(
            vm = vm.name,
            vcpus = self.config.vcpus,
            memory = self.config.memory_bytes,
            state = ?vm.handle().status().state,
            "guest is made"
        );
        Ok(vm)
    }

    /// Starts to dial all backends at once; they are waited for one after the other when their devices are built.
    fn connect_backends(&self) -> Result<Vec<(u8, WorkerHandle)>, VmError> {
        let devices = self.config.placed_devices().into_iter();
        devices.map(|(slot, device)| Ok((slot, maker::dial(device)?))).collect()
    }

    /// Puts a kernel in place and returns where it is entered. Firmware is entered where processors begin.
    fn load(&self) -> Result<Option<boot::Entry>, VmError> {
        let Boot::Kernel { kernel, initramfs, cmdline } = &self.config.boot else { return Ok(None) };
        let tables = Tables::build(&Description::initial(self.config.vcpus, self.config.most_vcpus()));
        let rsdp = tables.write(&self.memory).map_err(BootError::from)?;
        let initramfs = initramfs.as_deref();
        let memory_size = self.config.memory_bytes;
        let source = BootSource { kernel, initramfs, cmdline, memory_size, rsdp };
        let entry = boot::load(&self.memory, source)?;
        registers::write_gdt(&self.memory, entry).map_err(BootError::from)?;
        Ok(Some(entry))
    }

    /// Puts firmware in place, if it is what runs first, with its variables and what it asks about the machine.
    fn add_firmware(
        &self,
        pci: &Pci,
        display: Option<&display::Devices>,
        ports: &mut Bus,
        mmio: &mut Bus,
    ) -> Result<Option<flash::Code>, VmError> {
        let Boot::Firmware { code, template, variables } = &self.config.boot else { return Ok(None) };
        let code = flash::Code::open(code)?;
        let (store, content) = VariableStore::open(variables, template)?;
        let (start, len, chip) = flash::install(&self.kvm.vm, &code, store, content)?;
        mmio.insert(start, len, chip);
        let told = Arc::new(items::build(&self.machine(pci, display), &self.memory));
        ports.insert(layout::FW_CFG_PORT.into(), fw_cfg::PORTS_LEN, told);
        Ok(Some(code))
    }

    /// What firmware is told.
    fn machine(&self, pci: &Pci, display: Option<&display::Devices>) -> items::Machine {
        let (root, bridge) = (pci.root.clone(), pci.bridge.clone());
        let (vcpus, max_vcpus) = (self.config.vcpus, self.config.most_vcpus());
        let memory = self.config.memory_layout();
        let above_ram = memory.end().next_multiple_of(GIB);
        // There always is a window: firmware learns the size of the tables before it asks for them.
        let keyboard = if display.is_some() { Keyboard::Present } else { Keyboard::Absent };
        let describe = move || Description {
            vcpus,
            max_vcpus,
            ecam: bridge.ecam().map_or(layout::ECAM_START, |ecam| ecam.start),
            high_window: Some(root.high_window().unwrap_or(above_ram..above_ram + GIB)),
            keyboard,
        };
        items::Machine {
            id: self.config.id,
            vcpus,
            max_vcpus,
            memory_size: self.config.memory_bytes,
            reserved_end: (memory.pluggable > 0).then_some(above_ram),
            boot_slots: pci.boot_slots.clone(),
            describe: Arc::new(describe),
            ramfb: display.map(|devices| devices.ramfb.clone()),
        }
    }

    fn add_console(&self, ports: &mut Bus) -> Result<ConsoleServer, VmError> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(resource("eventfd"));
        let irq = event()?;
        self.interrupts.connect(&irq, Gsi(layout::COM1_IRQ))?;
        let output = Arc::new(Output::new().map_err(resource("eventfd"))?);
        let drained = event()?;
        let told = drained.try_clone().map_err(resource("eventfd"))?;
        let serial = Arc::new(SerialPort::new(IrqTrigger(irq), output.clone(), told));
        ports.insert(layout::COM1_PORT.into(), 8, serial.clone());
        let path = &self.config.console_socket;
        ConsoleServer::start(&self.made_at(path), output, serial, drained)
            .map_err(|source| VmError::Console { path: path.clone(), source })
    }

    fn add_power(&self, ports: &mut Bus) -> Arc<PowerDevice> {
        let device = Arc::new(PowerDevice::new(self.sci.clone(), self.lifecycle.clone()));
        ports.insert(layout::PM1_EVENT_PORT.into(), power::PM1_LEN, device.clone());
        ports.insert(layout::PANIC_PORT.into(), 1, Arc::new(PanicDevice::new(self.lifecycle.clone())));
        ports.insert(layout::PM_TIMER_PORT.into(), 4, Arc::new(PmTimer::new()));
        let low = memory::low_ram_end(self.config.memory_bytes);
        let cmos = Cmos::new(low, self.config.memory_bytes - low, self.config.vcpus);
        ports.insert(layout::CMOS_PORT.into(), 2, Arc::new(cmos));
        device
    }

    /// The keyboard controller: with a keyboard, and the other devices of a display, if the guest has one.
    fn add_keyboard(&self, ports: &mut Bus) -> Result<Option<display::Devices>, VmError> {
        if self.config.display_socket.is_none() {
            let controller = KeyboardController::new(self.lifecycle.clone());
            ports.insert(layout::I8042_COMMAND_PORT.into(), 1, Arc::new(controller));
            return Ok(None);
        }
        let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(resource("eventfd"))?;
        self.interrupts.connect(&interrupt, Gsi(layout::KEYBOARD_IRQ))?;
        let devices =
            display::Devices::new(interrupt, self.lifecycle.clone()).map_err(resource("eventfd"))?;
        ports.insert(layout::I8042_DATA_PORT.into(), display::PORTS_LEN, devices.keyboard.clone());
        Ok(Some(devices))
    }

    fn serve_display(&self, devices: Option<display::Devices>) -> Result<Option<DisplayServer>, VmError> {
        let (Some(devices), Some(path)) = (devices, &self.config.display_socket) else { return Ok(None) };
        let served = devices.serve(&self.made_at(path), self.memory.clone());
        served.map(Some).map_err(|source| VmError::Display { path: path.clone(), source })
    }

    /// Fills the bus: host bridge, random number generator, disks, NICs and what else is configured.
    fn add_pci(
        &self,
        workers: Vec<(u8, WorkerHandle)>,
        display: Option<&display::Devices>,
        ports: &mut Bus,
        mmio: &mut Bus,
    ) -> Result<Pci, VmError> {
        let bridge = Arc::new(HostBridge::new());
        let mut devices: Vec<(usize, Arc<dyn PciDevice>)> = vec![(0, bridge.clone())];
        devices.push((slots::RNG, self.maker.function(slots::RNG, Rng::default())?));
        // The disks come first.
        let disks = workers.iter().take(self.config.disks.len());
        let boot_slots = disks.map(|(slot, _)| usize::from(*slot)).collect();
        let deadline = Instant::now() + self.config.backend_timeout();
        for (slot, worker) in workers {
            let slot = usize::from(slot);
            let left = deadline.saturating_duration_since(Instant::now());
            devices.push((slot, self.maker.vhost_user(slot, worker, left)?));
        }
        let mut memories = Memories { boot_bytes: self.config.memory_bytes, ..Memories::default() };
        if let Some(config) = &self.config.balloon {
            let balloon = Balloon::new(config.bytes);
            memories.balloon = Some(balloon.wishes());
            let function = self.maker.telling(slots::BALLOON, balloon, Balloon::set_change)?;
            devices.push((slots::BALLOON, function));
        }
        if let Some(config) = &self.config.vsock {
            let vsock = Vsock::made_at(config.cid, &config.socket, &self.made_at(&config.socket));
            let vsock = vsock.map_err(resource("vsock"))?;
            devices.push((slots::VSOCK, self.maker.function(slots::VSOCK, vsock)?));
        }
        if let Some(region) = self.config.memory_layout().region() {
            let memory = Mem::new(region, self.config.plugged_bytes);
            memories.pluggable = Some(memory.pluggable());
            devices.push((slots::MEMORY, self.maker.telling(slots::MEMORY, memory, Mem::set_change)?));
        }
        if let Some(display) = display {
            devices.push((slots::TABLET, self.maker.function(slots::TABLET, display.tablet())?));
        }
        if let Some(path) = &self.config.seed {
            let seed = Seed::read(path).map_err(resource("seed disk"))?;
            devices.push((slots::SEED, self.maker.function(slots::SEED, seed)?));
        }
        if let Some(path) = &self.config.agent_socket {
            let port =
                Port::new(AGENT_PORT, &self.made_at(path)).map_err(resource("guest agent's socket"))?;
            devices.push((slots::AGENT, self.maker.function(slots::AGENT, port)?));
        }
        let bar = PciRoot::initial_bar(slots::WATCHDOG);
        let watchdog = Watchdog::new(self.lifecycle.clone(), self.gate.clone(), bar);
        devices.push((slots::WATCHDOG, Arc::new(watchdog.map_err(resource("watchdog thread"))?)));
        devices.push((slots::LPC, Arc::new(LpcBridge::new())));
        let root = Arc::new(PciRoot::new(devices));
        ports.insert(
            layout::PCI_CONFIG_PORT.into(),
            8,
            Arc::new(ConfigPorts::new(root.clone(), self.lifecycle.clone())),
        );
        root::connect(mmio, &root, &bridge);
        Ok(Pci { root, bridge, boot_slots, memories })
    }

    /// Makes the vCPUs.
    fn core(&self, entry: Option<boot::Entry>) -> Result<Core, VmError> {
        let vcpus = (0..self.config.vcpus).map(|id| self.maker.vcpu(id, entry));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        Ok(Core {
            id: self.config.id,
            vm: self.kvm.vm.clone(),
            memory: self.memory.clone(),
            vcpus,
            msrs: self.kvm.msrs.clone(),
            logs: None,
        })
    }

    fn start_vcpus(&self, vm: &Vm, core: &Core, ports: Arc<Bus>, mmio: Arc<Bus>) -> Result<(), VmError> {
        install_kick_handler().map_err(resource("signal handler"))?;
        let mut threads = vm.machine.vcpu_threads.lock();
        for (id, vcpu) in (0..).zip(&core.vcpus) {
            let context = VcpuContext {
                gate: vm.machine.gate.clone(),
                lifecycle: self.lifecycle.clone(),
                ports: ports.clone(),
                mmio: mmio.clone(),
            };
            threads.push(vcpu::spawn(id, vcpu.fd.clone(), context).map_err(resource("vCPU thread"))?);
        }
        Ok(())
    }
}
