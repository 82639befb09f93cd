//! A guest that fills so much memory, says so with an `R`, and then writes to a part of it all the time, or does nothing more.

/// Where what it writes to begins.
const PAGES: u32 = 0x20_0000;

/// Its code: `filled` pages are written to once, the first `written` of them again and again, with so many turns of a loop between two pages.
pub(crate) fn code(filled: u32, written: u32, pause: u32) -> Vec<u8> {
    let mut code = vec![0xbb, 1, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03]; // mov ebx, 1; mov dx, 0x3f8
    let first = |code: &mut Vec<u8>, pages: u32| {
        code.push(0xbf); // mov edi, PAGES
        code.extend_from_slice(&PAGES.to_le_bytes());
        code.push(0xbe); // mov esi, pages
        code.extend_from_slice(&pages.to_le_bytes());
    };
    first(&mut code, filled);
    // mov [edi], ebx; add edi, 4096; dec esi; jnz mov
    code.extend_from_slice(&[0x89, 0x1f, 0x81, 0xc7, 0x00, 0x10, 0, 0, 0x4e, 0x75, 0xf5]);
    code.extend_from_slice(&[0xb0, b'R', 0xee]); // mov al, 'R'; out dx, al
    if written == 0 {
        code.extend_from_slice(&[0xf4, 0xeb, 0xfd]); // hlt; jmp hlt
        return code;
    }
    let begin = code.len();
    code.push(0x43); // inc ebx
    first(&mut code, written);
    // mov [edi], ebx; add edi, 4096; mov ecx, pause; dec ecx; jnz dec; dec esi; jnz mov
    code.extend_from_slice(&[0x89, 0x1f, 0x81, 0xc7, 0x00, 0x10, 0, 0, 0xb9]);
    code.extend_from_slice(&pause.to_le_bytes());
    code.extend_from_slice(&[0x49, 0x75, 0xfd, 0x4e, 0x75, 0xed]);
    code.push(0xe9); // jmp begin
    let back = begin as i32 - (code.len() as i32 + 4);
    code.extend_from_slice(&back.to_le_bytes());
    code
}
