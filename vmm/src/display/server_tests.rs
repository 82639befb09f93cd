//! The running server, as its clients on the socket see it.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::IoDevice;
use crate::display::ramfb::{Size, setup};
use crate::firmware::fw_cfg::WritableFile;
use crate::layout::MIB;
use crate::memory;

const AT: u64 = MIB;
const SIZE: Size = Size { width: 64, height: 48 };
/// A request for all of the screen, and one for its changes.
const ALL: [u8; 10] = [3, 0, 0, 0, 0, 0, 0, 64, 0, 48];
const CHANGES: [u8; 10] = [3, 1, 0, 0, 0, 0, 0, 64, 0, 48];
const HELLO: &[u8] = b"RFB 003.008\n\x01\x01";
/// Version, security types, result, size, format, name.
const HELLO_ANSWER: usize = 12 + 2 + 4 + 4 + 16 + 4 + 3;
/// An update of one raw rectangle that is the whole screen.
const UPDATE: usize = 4 + 12 + 64 * 48 * 4;

struct Lab {
    folder: tempfile::TempDir,
    devices: Devices,
    memory: Memory,
    server: Option<DisplayServer>,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let devices = Devices::new(interrupt, Arc::default()).unwrap();
        let memory = memory::create(16 * MIB).unwrap();
        devices.ramfb.write(0, &setup(AT, SIZE, 0));
        let path = folder.path().join("display.sock");
        let server = Some(devices.clone().serve(&path, memory.clone()).unwrap());
        Self { folder, devices, memory, server }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("display.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// A client that has introduced itself.
    fn client(&self) -> UnixStream {
        let mut client = self.connect();
        client.write_all(HELLO).unwrap();
        let answer = read(&mut client, HELLO_ANSWER);
        assert_eq!(answer[18..22], [0, 64, 0, 48]);
        client
    }

    fn draw(&self, pixel: u32) {
        self.memory.write_obj(pixel, GuestAddress(AT)).unwrap();
    }

    /// The next byte from the keyboard.
    fn key(&self) -> u8 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut byte = [0];
            self.devices.keyboard.read(4, &mut byte);
            if byte[0] & 1 == 1 {
                self.devices.keyboard.read(0, &mut byte);
                return byte[0];
            }
            assert!(Instant::now() < deadline, "no key");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn read(client: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    client.read_exact(&mut data).unwrap();
    data
}

#[test]
fn every_client_sees_what_the_guest_draws() {
    let mut lab = Lab::new();
    lab.draw(0x01_0203);
    let mut clients = [lab.client(), lab.client()];
    for client in &mut clients {
        client.write_all(&ALL).unwrap();
        assert_eq!(read(client, UPDATE)[16..20], [3, 2, 1, 0]);
        client.write_all(&CHANGES).unwrap();
    }
    lab.draw(0x04_0506);
    for client in &mut clients {
        assert_eq!(read(client, UPDATE)[16..20], [6, 5, 4, 0]);
    }
    lab.server = None;
    assert_eq!(clients[0].read(&mut [0]).unwrap(), 0);
    assert!(!lab.folder.path().join("display.sock").exists());
}

#[test]
fn keys_arrive_and_are_released_for_a_client_that_goes() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.write_all(&[4, 1, 0, 0, 0, 0, 0, b'a']).unwrap();
    assert_eq!(lab.key(), 0x1e);
    drop(client);
    assert_eq!(lab.key(), 0x9e);
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody_and_one_too_many_is_turned_away() {
    let lab = Lab::new();
    let idle: Vec<_> = (1..MAX_CLIENTS)
        .map(|_| {
            let mut client = lab.client();
            for _ in 0..200 {
                client.write_all(&ALL).unwrap();
            }
            client
        })
        .collect();
    let mut client = lab.client();
    client.write_all(&ALL).unwrap();
    read(&mut client, UPDATE);
    assert_eq!(lab.connect().read(&mut [0]).unwrap(), 0);
    drop(idle);
}

#[test]
fn a_screen_of_another_size_is_shown_to_who_comes_then() {
    let lab = Lab::new();
    let mut before = lab.client();
    before.write_all(&ALL).unwrap();
    read(&mut before, UPDATE);
    lab.devices.ramfb.write(0, &setup(AT, Size { width: 80, height: 50 }, 0));
    before.write_all(&CHANGES).unwrap();
    read(&mut before, UPDATE);
    let mut after = lab.connect();
    after.write_all(HELLO).unwrap();
    assert_eq!(read(&mut after, HELLO_ANSWER)[18..22], [0, 80, 0, 50]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn what_clients_send_never_ends_the_server(junk in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..6)) {
        let lab = Lab::new();
        for bytes in junk {
            let mut client = lab.client();
            // The server may have closed it already.
            let _ = client.write_all(&bytes);
        }
        let mut client = lab.client();
        client.write_all(&ALL).unwrap();
        read(&mut client, UPDATE);
    }
}
