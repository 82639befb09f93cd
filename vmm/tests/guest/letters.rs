//! A guest that shows whether it goes on where it was: it counts in a register and in memory, and prints a letter after the other as long as
//! both agree.

/// inc cl; after 'z' comes 'a'
pub(crate) const NEXT_LETTER: [u8; 9] = [0xfe, 0xc1, 0x80, 0xf9, b'z' + 1, 0x75, 0x02, 0xb1, b'a'];

/// Its code. It turns so often in a loop between two letters: no client of its console may be slower than it is.
pub(crate) fn code(pause: u32) -> Vec<u8> {
    let mut code = vec![0x31, 0xdb]; // xor ebx, ebx
    code.extend_from_slice(&[0xbf, 0x00, 0x00, 0x20, 0x00]); // mov edi, 0x200000
    code.extend_from_slice(&[0xb1, b'a', 0x66, 0xba, 0xf8, 0x03]); // mov cl, 'a'; mov dx, 0x3f8
    let begin = code.len();
    code.extend_from_slice(&[0x43, 0xff, 0x07, 0x39, 0x1f]); // inc ebx; inc dword [edi]; cmp [edi], ebx
    code.extend_from_slice(&[0x75, 0x16]); // jne: they differ
    code.extend_from_slice(&[0x88, 0xc8, 0xee]); // mov al, cl; out dx, al
    code.extend_from_slice(&NEXT_LETTER);
    code.push(0xbe); // mov esi, pause
    code.extend_from_slice(&pause.to_le_bytes());
    code.extend_from_slice(&[0x4e, 0x75, 0xfd]); // dec esi; jnz
    code.extend_from_slice(&[0xeb, (begin as u8).wrapping_sub(code.len() as u8 + 2)]); // jmp begin
    code.extend_from_slice(&[0xb0, b'!', 0xee, 0xeb, 0xfe]); // prints a mark and spins
    code
}

/// The letter that comes after this one, or first.
pub(crate) fn following(last: Option<u8>) -> u8 {
    last.filter(|last| *last != b'z').map_or(b'a', |last| last + 1)
}
