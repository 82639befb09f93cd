//! Messages of clients (RFC 6143, 7.5): where one ends, and what it says.

use super::keysym;
use super::pixels::{FORMAT_LEN, PixelFormat};
use crate::display::keyboard::{Action, Key};
use crate::display::screen::Rectangle;

/// Encodings in one message. Clients know some dozens.
const MAX_ENCODINGS: usize = 1024;
/// Longest text of a client's clipboard that is skipped; the client of a longer one goes.
const MAX_TEXT: u32 = 16 << 20;

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    Format(PixelFormat),
    Encodings(Vec<i32>),
    Request {
        wish: Wish,
        area: Rectangle,
    },
    /// None: a key that there is no code for.
    Key(Option<(Key, Action)>),
    Pointer {
        buttons: u8,
        x: u16,
        y: u16,
    },
    /// The clipboard's text, of so many bytes, follows.
    Text(u32),
    /// The screen should have another size.
    Resize,
}

/// What is asked for of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// What has changed.
    Changes,
    /// All of it.
    All,
}

/// A message that ends the conversation.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::display) enum MessageError {
    /// An unknown type, or one that has not been agreed on.
    #[error("a message of type {0}")]
    Type(u8),
    /// Pixels that nobody can send.
    #[error("a pixel format that is not true colour, or makes no sense")]
    Format,
    /// Longer than any client needs.
    #[error("a message that is too long")]
    TooLong,
}

/// Reads a message from the front, and says how long it is; none while more has to come.
pub(super) fn read(data: &[u8]) -> Result<Option<(Message, usize)>, MessageError> {
    let Some(kind) = data.first() else { return Ok(None) };
    let short = |at: usize| Some(u16::from_be_bytes([*data.get(at)?, *data.get(at + 1)?]));
    let word = |at: usize| Some(u32::from(short(at)?) << 16 | u32::from(short(at + 2)?));
    let action = |down: bool| if down { Action::Press } else { Action::Release };
    Ok(match kind {
        0 => match data.get(4..4 + FORMAT_LEN).and_then(|format| format.try_into().ok()) {
            Some(format) => {
                let format = PixelFormat::parse(format).ok_or(MessageError::Format)?;
                Some((Message::Format(format), 4 + FORMAT_LEN))
            }
            None => None,
        },
        2 => match short(2).map(usize::from) {
            Some(count) if count > MAX_ENCODINGS => return Err(MessageError::TooLong),
            Some(count) => {
                let encodings: Option<Vec<_>> =
                    (0..count).map(|at| Some(word(4 + 4 * at)?.cast_signed())).collect();
                encodings.map(|encodings| (Message::Encodings(encodings), 4 + 4 * count))
            }
            None => None,
        },
        3 => short(8).and_then(|height| {
            let area = Rectangle { x: short(2)?, y: short(4)?, width: short(6)?, height };
            let wish = if *data.get(1)? == 0 { Wish::All } else { Wish::Changes };
            Some((Message::Request { wish, area }, 10))
        }),
        4 => word(4).and_then(|symbol| {
            let action = action(*data.get(1)? != 0);
            Some((Message::Key(keysym::key(symbol).map(|key| (key, action))), 8))
        }),
        5 => short(4).and_then(|y| Some((Message::Pointer { buttons: *data.get(1)?, x: short(2)?, y }, 6))),
        6 => match word(4) {
            // A negative length is that of an extension, in which no client has reason to believe.
            Some(len) if len.cast_signed().unsigned_abs() > MAX_TEXT => return Err(MessageError::TooLong),
            Some(len) => Some((Message::Text(len.cast_signed().unsigned_abs()), 8)),
            None => None,
        },
        251 => match data.get(6) {
            Some(screens) => {
                let len = 8 + 16 * usize::from(*screens);
                (data.len() >= len).then_some((Message::Resize, len))
            }
            None => None,
        },
        255 => match data.get(1) {
            Some(0) => match (short(2), word(4), word(8)) {
                (Some(down), Some(symbol), Some(code)) => {
                    let key = Key::from_rfb(code).or_else(|| keysym::key(symbol));
                    Some((Message::Key(key.map(|key| (key, action(down != 0)))), 12))
                }
                _ => None,
            },
            Some(_) => return Err(MessageError::Type(255)),
            None => None,
        },
        kind => return Err(MessageError::Type(*kind)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(data: &[u8]) -> Message {
        for len in 0..data.len() {
            assert_eq!(read(&data[..len]), Ok(None), "{len} of {data:?}");
        }
        let (message, len) = read(&[data, &[0xff; 8]].concat()).unwrap().unwrap();
        assert_eq!(len, data.len());
        message
    }

    #[test]
    fn messages_are_read_when_they_are_whole() {
        let format = [&[0; 4][..], &PixelFormat::NATIVE.bytes()].concat();
        assert_eq!(whole(&format), Message::Format(PixelFormat::NATIVE));
        let encodings = [2, 0, 0, 2, 0, 0, 0, 16, 0xff, 0xff, 0xfe, 0xfe];
        assert_eq!(whole(&encodings), Message::Encodings(vec![16, -258]));
        let area = Rectangle { x: 1, y: 2, width: 3, height: 0x102 };
        let request = [3, 1, 0, 1, 0, 2, 0, 3, 1, 2];
        assert_eq!(whole(&request), Message::Request { wish: Wish::Changes, area });
        let key = [4, 1, 0, 0, 0, 0, 0, b'a'];
        assert_eq!(whole(&key), Message::Key(Some((Key::main(0x1e), Action::Press))));
        assert_eq!(whole(&[4, 1, 0, 0, 1, 0, 0x20, 0xac]), Message::Key(None));
        assert_eq!(whole(&[5, 1, 0, 2, 1, 0]), Message::Pointer { buttons: 1, x: 2, y: 256 });
        assert_eq!(whole(&[6, 0, 0, 0, 0, 1, 0, 0]), Message::Text(65536));
        let resize = [&[251, 0, 4, 0, 3, 0, 1, 0][..], &[0; 16]].concat();
        assert_eq!(whole(&resize), Message::Resize);
        let extended = [255, 0, 0, 0, 0, 0, 0xff, 0x52, 0, 0, 0, 0xc8];
        assert_eq!(whole(&extended), Message::Key(Some((Key::extended(0x48), Action::Release))));
        let unknown = [255, 0, 0, 1, 0, 0, 0xff, 0x0d, 0, 0, 0, 0];
        assert_eq!(whole(&unknown), Message::Key(Some((Key::main(0x1c), Action::Press))), "by its symbol");
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        assert_eq!(read(&[2, 0, 0xff, 0xff]), Err(MessageError::TooLong));
        assert_eq!(read(&[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]), Err(MessageError::TooLong));
        assert_eq!(read(&[6, 0, 0, 0, 0x80, 0, 0, 0]), Err(MessageError::TooLong));
        assert_eq!(read(&[255, 1]), Err(MessageError::Type(255)));
        assert_eq!(read(&[7]), Err(MessageError::Type(7)));
        assert_eq!(read(&[0; 20]), Err(MessageError::Format));
    }
}
