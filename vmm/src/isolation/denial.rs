//! Says which call a filter has refused, before the process ends.
//!
//! The filters answer with `SIGSYS`. Its handler writes one line and ends the process; it returns never, so the call is not made.

use std::io;

/// What the shell would show of a process that `SIGSYS` has ended.
const EXIT_CODE: libc::c_int = 128 + libc::SIGSYS;
/// Where the kernel puts the number of the call, in `siginfo_t`.
const NUMBER_AT: usize = 24;

/// Installs the handler.
pub(super) fn report_denials() -> io::Result<()> {
    // SAFETY: all zeros is a valid `sigaction`; its members are set below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = report as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` lives through the call, and the handler is one that calls nothing but write and _exit.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn report(_signal: libc::c_int, info: *const libc::siginfo_t, _context: *const libc::c_void) {
    // SAFETY: the kernel passes a whole siginfo_t, in which a SIGSYS of a filter has the number there.
    let number = unsafe { info.cast::<u8>().add(NUMBER_AT).cast::<libc::c_int>().read_unaligned() };
    let mut line = [0; LINE];
    let len = write_line(&mut line, number.unsigned_abs());
    // SAFETY: both are async-signal-safe; the buffer is as long as is said.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len);
        libc::_exit(EXIT_CODE)
    }
}

const BEFORE: &[u8] = b"the VMM is stopped: it asked for system call ";
const AFTER: &[u8] = b", which it never needs\n";
const LINE: usize = BEFORE.len() + 10 + AFTER.len();

/// Makes the line without allocating and returns its length.
fn write_line(line: &mut [u8; LINE], mut number: u32) -> usize {
    let mut digits = [0; 10];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    let mut len = 0;
    for part in [BEFORE, &digits[at..], AFTER] {
        line[len..len + part.len()].copy_from_slice(part);
        len += part.len();
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_holds_the_number() {
        for number in [0, 59, u32::MAX] {
            let mut line = [0; LINE];
            let len = write_line(&mut line, number);
            let text = std::str::from_utf8(&line[..len]).unwrap();
            assert!(text.contains(&format!(" {number},")) && text.ends_with('\n'), "{text}");
        }
    }
}
