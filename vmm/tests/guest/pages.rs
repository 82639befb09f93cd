//! A guest that shows whether its memory is whole: it writes the number of its turn to each of many pages, and prints a letter after the other as
//! long as it finds in all of them what it wrote the turn before.

use crate::letters::NEXT_LETTER;

/// Where its pages begin.
const PAGES: u32 = 0x20_0000;

/// Its code, for so many pages. It turns so often in a loop between two letters.
pub(crate) fn code(pages: u32, pause: u32) -> Vec<u8> {
    let mut code = vec![0x31, 0xdb, 0xb1, b'a', 0x66, 0xba, 0xf8, 0x03]; // xor ebx, ebx; mov cl, 'a'; mov dx, 0x3f8
    let begin = code.len();
    let first = |code: &mut Vec<u8>| {
        code.push(0xbf); // mov edi, PAGES
        code.extend_from_slice(&PAGES.to_le_bytes());
        code.push(0xbe); // mov esi, pages
        code.extend_from_slice(&pages.to_le_bytes());
    };
    first(&mut code);
    code.extend_from_slice(&[0x39, 0x1f, 0x0f, 0x85, 0, 0, 0, 0]); // cmp [edi], ebx; jne: it lacks something
    let differs = code.len();
    code.extend_from_slice(&[0x81, 0xc7, 0x00, 0x10, 0, 0, 0x4e, 0x75, 0xef]); // add edi, 4096; dec esi; jnz cmp
    code.push(0x43); // inc ebx
    first(&mut code);
    // mov [edi], ebx; add edi, 4096; dec esi; jnz mov
    code.extend_from_slice(&[0x89, 0x1f, 0x81, 0xc7, 0x00, 0x10, 0, 0, 0x4e, 0x75, 0xf5]);
    code.extend_from_slice(&[0x88, 0xc8, 0xee]); // mov al, cl; out dx, al
    code.extend_from_slice(&NEXT_LETTER);
    code.push(0xbe); // mov esi, pause
    code.extend_from_slice(&pause.to_le_bytes());
    code.extend_from_slice(&[0x4e, 0x75, 0xfd, 0xe9]); // dec esi; jnz; jmp begin
    let back = begin as i32 - (code.len() as i32 + 4);
    code.extend_from_slice(&back.to_le_bytes());
    let ahead = (code.len() - differs) as u32;
    code[differs - 4..differs].copy_from_slice(&ahead.to_le_bytes());
    code.extend_from_slice(&[0xb0, b'!', 0xee, 0xeb, 0xfe]); // prints a mark and spins
    code
}
