//! Guests of a few instructions whose parts come and go while they run: they play the part of a system's ACPI code.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened. One test at a time ([`ALONE`]): descriptors and threads of this process are counted.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod guest;
#[allow(dead_code, reason = "the guests here end one way only")]
mod lab;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lab::{DEADLINE, Lab, wait};
use vmm::{Boot, DeviceConfig, ExitReason, MacAddr, NicConfig, Vm, VmConfig, VmHandle};

static ALONE: Mutex<()> = Mutex::new(());

const CONSOLE: u16 = 0x3f8;
/// Registers of hotplug.
const VCPUS: u16 = 0x622;
const PLUGGED: u16 = 0x624;
const ASKED: u16 = 0x628;
const EJECT: u16 = 0x62c;

/// mov dx, port
fn port(port: u16) -> Vec<u8> {
    [&[0x66, 0xba][..], &port.to_le_bytes()].concat()
}

/// Prints a letter.
fn print(letter: u8) -> Vec<u8> {
    // mov al, letter; out dx, al
    [port(CONSOLE), vec![0xb0, letter, 0xee]].concat()
}

/// mov dword [address], value
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05], &address.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

/// Does something if a register is not zero, which it acknowledges first. EAX has the value.
fn when(register: u16, act: &[u8]) -> Vec<u8> {
    // out dx, eax
    let body = [&[0xef][..], act].concat();
    // in eax, dx; test eax, eax; jz past the body
    [port(register), vec![0xed, 0x85, 0xc0, 0x74, body.len() as u8], body].concat()
}

/// Says `p` for what was plugged; lets go at once of what it is asked for, and says `e`.
fn obedient() -> Vec<u8> {
    let eject = [port(EJECT), vec![0xef], print(b'e')].concat();
    let mut code = [when(PLUGGED, &print(b'p')), when(ASKED, &eject)].concat();
    let back = -(code.len() as i32 + 2);
    code.extend([0xeb, i8::try_from(back).unwrap() as u8]); // jmp to the beginning
    code
}

/// Waits until there are three processors, starts the others, and waits for ever. Each of them says `A`.
fn starter() -> Vec<u8> {
    // In real mode: mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt; jmp to hlt
    let other = [0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xf4, 0xeb, 0xfd, 0x90, 0x90, 0x90];
    const PLACE: u32 = 0x8000;
    // in al, dx; cmp al, 3; jne to in
    let mut code = [port(VCPUS), vec![0xec, 0x3c, 3, 0x75, 0xfb]].concat();
    for (at, word) in (PLACE..).step_by(4).zip(other.chunks(4)) {
        code.extend(store(at, u32::from_le_bytes(word.try_into().unwrap())));
    }
    code.extend(store(0xfee0_00f0, 0x1ff));
    // INIT, then the page to start at, to all but itself.
    code.extend(store(0xfee0_0300, 0xc_4500));
    code.extend(store(0xfee0_0300, 0xc_4600 | PLACE >> 12));
    code.extend([0xeb, 0xfe]);
    code
}

/// A guest whose end somebody waits for, which does what it is asked for meanwhile.
struct Guest {
    handle: VmHandle,
    waiter: std::thread::JoinHandle<ExitReason>,
    console: UnixStream,
}

impl Guest {
    fn start(lab: &Lab, code: &[u8]) -> Self {
        let kernel = lab.file("kernel", &guest::pvh_elf(code));
        let boot = Boot::Kernel { kernel, initramfs: None, cmdline: String::new() };
        let vm = Vm::start(VmConfig { max_vcpus: Some(3), ..lab.config(boot, 1) }).unwrap();
        let console = lab.console();
        let handle = vm.handle();
        Self { handle, waiter: std::thread::spawn(move || wait(vm)), console }
    }

    fn says(&mut self, wanted: u8) {
        let mut letter = [0];
        self.console.read_exact(&mut letter).unwrap();
        assert_eq!(letter[0] as char, wanted as char);
    }

    fn end(self) {
        self.handle.kill();
        assert_eq!(self.waiter.join().unwrap(), ExitReason::Killed);
    }
}

/// Descriptors and threads of this process.
fn counts() -> (usize, usize) {
    let count = |of: &str| fs::read_dir(format!("/proc/self/{of}")).unwrap().count();
    (count("fd"), count("task"))
}

fn wait_for<T: PartialEq + std::fmt::Debug>(wanted: T, seen: impl Fn() -> T) {
    let deadline = Instant::now() + DEADLINE;
    while seen() != wanted {
        assert!(Instant::now() < deadline, "{:?} is not {wanted:?}", seen());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A backend that says what it offers to whoever connects, one after the other, and does nothing.
fn serve(listener: &UnixListener) {
    const GET_FEATURES: u32 = 1;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Modern virtio; there are protocol features.
    const OFFERED: u64 = 1 << 32 | 1 << 30;
    /// Version 1, an answer.
    const FLAGS: u32 = 0b101;
    for connection in listener.incoming() {
        let mut connection = connection.unwrap();
        let mut header = [0; 12];
        while connection.read_exact(&mut header).is_ok() {
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            connection.read_exact(&mut vec![0; word(8) as usize]).unwrap();
            let answer = match word(0) {
                GET_FEATURES => OFFERED,
                GET_PROTOCOL_FEATURES => 0,
                _ => continue,
            };
            let words = [word(0), FLAGS, 8];
            let head = words.iter().flat_map(|word| word.to_le_bytes());
            connection.write_all(&head.chain(answer.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        }
    }
}

#[test]
fn devices_that_come_and_go_two_hundred_times_leave_nothing_behind() {
    let Some(lab) = Lab::new() else { return };
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let socket = lab.path("n.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || serve(&listener));
    let mut guest = Guest::start(&lab, &obedient());
    let nic = NicConfig { id: "n".into(), socket, mac: MacAddr([2, 0, 0, 0, 0, 1]), mtu: None, slot: None };
    let mut before = None;
    for _ in 0..200 {
        assert_eq!(guest.handle.plug(DeviceConfig::Nic(nic.clone())).unwrap(), 2);
        guest.says(b'p');
        guest.handle.unplug("n").unwrap();
        guest.says(b'e');
        wait_for(0, || guest.handle.status().devices.len());
        // The other end of the connection is this process, too: it ends a moment later.
        let before = *before.get_or_insert_with(|| {
            std::thread::sleep(Duration::from_millis(100));
            counts()
        });
        wait_for(before, counts);
    }
    guest.end();
}

#[test]
fn processors_that_are_added_are_started_by_the_guest() {
    let Some(lab) = Lab::new() else { return };
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut guest = Guest::start(&lab, &starter());
    guest.handle.set_vcpus(2).unwrap();
    guest.handle.set_vcpus(3).unwrap();
    guest.says(b'A');
    guest.says(b'A');
    assert_eq!(guest.handle.status().vcpus, 3);
    guest.end();
}
