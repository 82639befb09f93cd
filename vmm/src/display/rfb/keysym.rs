//! Keys by their symbols (X11's keysyms), for clients that do not say which key it was: those of a US keyboard. A symbol that needs
//! Shift there comes with the client's own Shift, as the user pressed it.

use crate::display::keyboard::Key;

/// Keys of the main block with their two symbols, by code of set 1 from 2 on, row by row.
const ROWS: [(u8, &[u8], &[u8]); 4] = [
    (0x02, b"1234567890-=", b"!@#$%^&*()_+"),
    (0x10, b"qwertyuiop[]", b"QWERTYUIOP{}"),
    (0x1e, b"asdfghjkl;'`", b"ASDFGHJKL:\"~"),
    (0x2b, b"\\zxcvbnm,./", b"|ZXCVBNM<>?"),
];

/// The key that has this symbol.
pub(super) fn key(symbol: u32) -> Option<Key> {
    let main = |code: u8| Some(Key::main(code));
    let extended = |code: u8| Some(Key::extended(code));
    match symbol {
        0x20 => main(0x39),
        0x21..=0x7e => ROWS.iter().find_map(|(first, plain, shifted)| {
            let at = plain
                .iter()
                .zip(*shifted)
                .position(|(a, b)| [u32::from(*a), u32::from(*b)].contains(&symbol));
            Some(Key::main(first + at? as u8))
        }),
        // Backspace, Tab (and with Shift), Return, Escape.
        0xff08 => main(0x0e),
        0xff09 | 0xfe20 => main(0x0f),
        0xff0d => main(0x1c),
        0xff1b => main(0x01),
        // Print, Pause, Scroll Lock, Num Lock, Menu.
        0xff61 => extended(0x37),
        0xff13 => extended(0x46),
        0xff14 => main(0x46),
        0xff7f => main(0x45),
        0xff67 => extended(0x5d),
        // Home, arrows, Page Up and Down, End; Insert, Delete.
        0xff50 => extended(0x47),
        0xff51 => extended(0x4b),
        0xff52 => extended(0x48),
        0xff53 => extended(0x4d),
        0xff54 => extended(0x50),
        0xff55 => extended(0x49),
        0xff56 => extended(0x51),
        0xff57 => extended(0x4f),
        0xff63 => extended(0x52),
        0xffff => extended(0x53),
        // The number pad: with Num Lock, and without.
        0xffb7 | 0xff95 => main(0x47),
        0xffb8 | 0xff97 => main(0x48),
        0xffb9 | 0xff9a => main(0x49),
        0xffb4 | 0xff96 => main(0x4b),
        0xffb5 | 0xff9d => main(0x4c),
        0xffb6 | 0xff98 => main(0x4d),
        0xffb1 | 0xff9c => main(0x4f),
        0xffb2 | 0xff99 => main(0x50),
        0xffb3 | 0xff9b => main(0x51),
        0xffb0 | 0xff9e => main(0x52),
        0xffae | 0xff9f => main(0x53),
        0xffaa => main(0x37),
        0xffab => main(0x4e),
        0xffad => main(0x4a),
        0xffaf => extended(0x35),
        0xff8d => extended(0x1c),
        // F1 to F10, F11, F12.
        0xffbe..=0xffc7 => main(0x3b + (symbol - 0xffbe) as u8),
        0xffc8 => main(0x57),
        0xffc9 => main(0x58),
        // Shift, Control, Caps Lock, Alt and Meta, Super, AltGr.
        0xffe1 => main(0x2a),
        0xffe2 => main(0x36),
        0xffe3 => main(0x1d),
        0xffe4 => extended(0x1d),
        0xffe5 => main(0x3a),
        0xffe7 | 0xffe9 => main(0x38),
        0xffe8 | 0xffea | 0xfe03 => extended(0x38),
        0xffeb => extended(0x5b),
        0xffec => extended(0x5c),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_found_on_a_us_keyboard() {
        for (symbol, code) in [
            ('a', 0x1e),
            ('Z', 0x2c),
            ('1', 0x02),
            ('!', 0x02),
            ('-', 0x0c),
            ('`', 0x29),
            ('|', 0x2b),
            ('?', 0x35),
        ] {
            assert_eq!(key(symbol.into()), Some(Key::main(code)), "{symbol}");
        }
        assert_eq!(key(0xff0d), Some(Key::main(0x1c)));
        assert_eq!(key(0xff52), Some(Key::extended(0x48)));
        assert_eq!(key(0xffc7), Some(Key::main(0x44)));
        assert_eq!(key(0x100_20ac), None);
    }

    #[test]
    fn every_character_of_a_us_keyboard_has_a_key() {
        let mut keys: Vec<_> =
            (0x20..0x7f).map(|symbol| key(symbol).unwrap_or_else(|| panic!("{symbol:#x}"))).collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 48, "47 keys with two symbols, and the space bar");
    }
}
