//! A guest that lets go of every disk and NIC that it is asked for, and prints a dot for each time.

/// `HOTPLUG_PORT`: where the guest is told what it is asked for, and where it lets go.
const ASKED: u16 = 0x628;
const EJECT: u16 = 0x62c;

/// Its code.
pub(crate) fn code() -> Vec<u8> {
    let port = |port: u16| [&[0x66, 0xba][..], &port.to_le_bytes()].concat(); // mov dx, port
    let mut code = [port(ASKED), vec![0xed, 0x85, 0xc0]].concat(); // in eax, dx; test eax, eax
    let act = [
        vec![0xef], // out dx, eax: that is seen
        port(EJECT),
        vec![0xef],
        port(0x3f8),
        vec![0xb0, b'.', 0xee], // mov al, '.'; out dx, al
    ]
    .concat();
    code.extend([0x74, act.len() as u8]); // jz past it
    code.extend(act);
    code.extend([0xeb, (code.len() as u8 + 2).wrapping_neg()]); // jmp to the beginning
    code
}
