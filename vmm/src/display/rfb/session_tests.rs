//! A client's view of a session.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::zrle::tests::read_tile;
use super::*;
use crate::display::ramfb::{Ramfb, setup};
use crate::firmware::fw_cfg::WritableFile;
use crate::layout::MIB;
use crate::memory::{self, Memory};

const SIZE: Size = Size { width: 200, height: 100 };
const AT: u64 = MIB;

/// A guest with a screen, and a client in front of it.
struct Stage {
    memory: Memory,
    ramfb: Ramfb,
    screen: Screen,
    session: Session,
    inflater: Box<miniz_oxide::inflate::stream::InflateState>,
}

/// A rectangle that the client got.
#[derive(Debug, PartialEq)]
enum Got {
    Pixels(Rectangle, Vec<Rgb>),
    Size([u16; 4]),
    PlainSize(u16, u16),
    ExtendedKeys,
}

impl Stage {
    fn new() -> Self {
        let memory = memory::create(16 * MIB).unwrap();
        let ramfb = Ramfb::default();
        ramfb.write(0, &setup(AT, SIZE, 0));
        let mut screen = Screen::new();
        screen.update(&ramfb, &memory);
        let session = Session::new(screen.size());
        let inflater = miniz_oxide::inflate::stream::InflateState::new_boxed(miniz_oxide::DataFormat::Zlib);
        Self { memory, ramfb, screen, session, inflater }
    }

    /// One whose client has introduced itself.
    fn running() -> Self {
        let mut stage = Self::new();
        stage.tell(b"RFB 003.008\n\x01\x01");
        stage.heard();
        stage
    }

    fn tell(&mut self, bytes: &[u8]) -> Vec<Input> {
        let mut inputs = Vec::new();
        self.session.receive(bytes, &mut inputs).unwrap();
        inputs
    }

    fn encodings(&mut self, encodings: &[i32]) {
        let mut message = vec![2, 0];
        message.extend((encodings.len() as u16).to_be_bytes());
        encodings.iter().for_each(|encoding| message.extend(encoding.to_be_bytes()));
        self.tell(&message);
    }

    fn ask(&mut self, wish: Wish) {
        let mut message = vec![3, u8::from(wish == Wish::Changes), 0, 0, 0, 0];
        message.extend(SIZE.width.to_be_bytes());
        message.extend(SIZE.height.to_be_bytes());
        self.tell(&message);
    }

    /// The guest draws a pixel, and the server looks.
    fn draw(&mut self, x: u64, y: u64, rgb: Rgb) {
        let at = AT + (y * u64::from(self.screen.size().width) + x) * 4;
        self.memory.write_obj(rgb, GuestAddress(at)).unwrap();
        self.look();
    }

    fn look(&mut self) {
        let change = self.screen.update(&self.ramfb, &self.memory);
        self.session.screen_changed(self.screen.size(), &change);
    }

    /// All that the server says now.
    fn heard(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        loop {
            self.session.fill(&self.screen).unwrap();
            let piece = self.session.output().to_vec();
            if piece.is_empty() {
                return heard;
            }
            self.session.sent(piece.len());
            heard.extend(piece);
        }
    }

    /// The update that the server sends now, if it does.
    fn update(&mut self) -> Vec<Got> {
        let heard = self.heard();
        let mut data = &heard[..];
        if data.is_empty() {
            return Vec::new();
        }
        let mut take = |len: usize| {
            let (first, rest) = data.split_at(len);
            data = rest;
            first
        };
        let short = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
        let head = take(4);
        assert_eq!(head[..2], [0, 0]);
        let mut got = Vec::new();
        for _ in 0..short(&head[2..]) {
            let head = take(12);
            let place = [short(head), short(&head[2..]), short(&head[4..]), short(&head[6..])];
            let [x, y, width, height] = place;
            let rectangle = Rectangle { x, y, width, height };
            got.push(match i32::from_be_bytes(head[8..].try_into().unwrap()) {
                RAW => {
                    let pixels = take(usize::from(width) * usize::from(height) * 4).chunks(4);
                    let rgb = |pixel: &[u8]| u32::from_le_bytes(pixel.try_into().unwrap());
                    Got::Pixels(rectangle, pixels.map(rgb).collect())
                }
                ZRLE => {
                    let len = u32::from_be_bytes(take(4).try_into().unwrap()) as usize;
                    Got::Pixels(rectangle, self.inflate(take(len), rectangle))
                }
                EXTENDED_KEYS => Got::ExtendedKeys,
                EXTENDED_DESKTOP_SIZE => {
                    let screens = take(20);
                    assert_eq!(
                        (screens[0], short(&screens[12..]), short(&screens[14..])),
                        (1, width, height)
                    );
                    Got::Size(place)
                }
                DESKTOP_SIZE => Got::PlainSize(width, height),
                other => panic!("encoding {other}"),
            });
        }
        assert!(data.is_empty(), "more than was announced");
        got
    }

    fn inflate(&mut self, data: &[u8], rectangle: Rectangle) -> Vec<Rgb> {
        let mut plain = vec![0; 4 << 20];
        let flush = miniz_oxide::MZFlush::Sync;
        let result = miniz_oxide::inflate::stream::inflate(&mut self.inflater, data, &mut plain, flush);
        assert_eq!(result.bytes_consumed, data.len());
        let mut tiles = &plain[..result.bytes_written];
        let (width, height) = (usize::from(rectangle.width), usize::from(rectangle.height));
        let mut pixels = vec![0; width * height];
        for left in (0..width).step_by(TILE.into()) {
            let part = (width - left).min(TILE.into());
            for (at, pixel) in read_tile(&mut tiles, part, height).into_iter().enumerate() {
                pixels[at / part * width + left + at % part] = pixel;
            }
        }
        assert!(tiles.is_empty());
        pixels
    }
}

/// What the client has on its screen after these rectangles.
fn paint(got: &[Got], size: Size) -> Vec<Option<Rgb>> {
    let mut picture = vec![None; usize::from(size.width) * usize::from(size.height)];
    for got in got {
        let Got::Pixels(area, pixels) = got else { continue };
        for (at, pixel) in pixels.iter().enumerate() {
            let x = usize::from(area.x) + at % usize::from(area.width);
            let y = usize::from(area.y) + at / usize::from(area.width);
            picture[y * usize::from(size.width) + x] = Some(*pixel);
        }
    }
    picture
}

#[test]
fn all_versions_of_the_beginning_are_spoken() {
    let init = [&[0, 200, 0, 100][..], &PixelFormat::NATIVE.bytes(), &[0, 0, 0, 3], b"HCI"].concat();
    let mut stage = Stage::new();
    assert_eq!(stage.heard(), VERSION);
    stage.tell(b"RFB 003.008\n");
    assert_eq!(stage.heard(), [1, 1]);
    stage.tell(&[1]);
    assert_eq!(stage.heard(), [0; 4]);
    stage.tell(&[0]);
    assert_eq!(stage.heard(), init);

    let mut stage = Stage::new();
    stage.tell(b"RFB 003.007\n\x01\x01");
    assert_eq!(stage.heard(), [VERSION, &[1, 1][..], &init].concat());
    let mut stage = Stage::new();
    stage.tell(b"RFB 003.003\n\x01");
    assert_eq!(stage.heard(), [VERSION, &[0, 0, 0, 1][..], &init].concat());

    let refused = |bytes: &[u8]| Stage::new().session.receive(bytes, &mut Vec::new()).is_err();
    assert!(refused(b"GET / HTTP/1"));
    assert!(refused(b"RFB 004.001\n"));
    assert!(refused(b"RFB 003.008\n\x02"));
}

#[test]
fn a_client_sees_the_screen_and_what_changes_on_it() {
    for encoding in [RAW, ZRLE] {
        let mut stage = Stage::running();
        stage.draw(199, 99, 0x12_3456);
        stage.encodings(&[1, encoding, RAW]);
        assert!(stage.update().is_empty(), "nothing was asked for");
        stage.ask(Wish::All);
        let picture = paint(&stage.update(), SIZE);
        assert!(picture[..picture.len() - 1].iter().all(|pixel| *pixel == Some(0)));
        assert_eq!(picture[picture.len() - 1], Some(0x12_3456));

        stage.ask(Wish::Changes);
        stage.look();
        assert!(stage.update().is_empty(), "nothing has changed");
        stage.draw(70, 3, 0xff_ffff);
        let update = stage.update();
        let [Got::Pixels(area, _)] = &update[..] else { panic!("one area: {update:?}") };
        assert_eq!(*area, Rectangle { x: 64, y: 0, width: 64, height: 64 });
        assert_eq!(paint(&update, SIZE)[3 * 200 + 70], Some(0xff_ffff));
        stage.draw(70, 3, 0);
        assert!(stage.update().is_empty(), "one request, one update");
        stage.ask(Wish::All);
        assert!(paint(&stage.update(), SIZE).iter().all(Option::is_some));
    }
}

#[test]
fn clients_learn_of_a_new_size_as_they_can() {
    let new = Size { width: 320, height: 240 };
    let change = |stage: &mut Stage| {
        stage.ask(Wish::All);
        let update = stage.update();
        stage.ramfb.write(0, &setup(AT, new, 0));
        stage.ask(Wish::Changes);
        stage.look();
        update
    };
    let mut stage = Stage::running();
    stage.encodings(&[RAW, DESKTOP_SIZE]);
    change(&mut stage);
    assert_eq!(stage.update(), [Got::PlainSize(320, 240)]);
    stage.ask(Wish::Changes);
    assert!(paint(&stage.update(), new).iter().all(Option::is_some), "everything is new");

    let mut stage = Stage::running();
    stage.encodings(&[RAW, DESKTOP_SIZE, EXTENDED_DESKTOP_SIZE, EXTENDED_KEYS]);
    let first = change(&mut stage);
    assert_eq!(first[..2], [Got::Size([0, 0, 200, 100]), Got::ExtendedKeys]);
    assert_eq!(stage.update(), [Got::Size([0, 0, 320, 240])]);
    stage.tell(&[251, 0, 4, 0, 3, 0, 0, 0]);
    stage.ask(Wish::All);
    assert_eq!(stage.update()[0], Got::Size([1, 1, 320, 240]), "the guest decides");

    let mut stage = Stage::running();
    change(&mut stage);
    assert!(paint(&stage.update(), SIZE).iter().all(Option::is_some), "its part of the new screen");
}

#[test]
fn keys_and_pointer_come_out_and_held_keys_are_known() {
    let mut stage = Stage::running();
    let key = Key::main(0x1e);
    assert_eq!(stage.tell(&[4, 1, 0, 0, 0, 0, 0, b'a']), [Input::Key(key, Action::Press)]);
    assert_eq!(stage.session.held_keys().collect::<Vec<_>>(), [key]);
    assert_eq!(stage.tell(&[4, 0, 0, 0, 0, 0, 0, b'a']), [Input::Key(key, Action::Release)]);
    assert_eq!(stage.session.held_keys().count(), 0);
    let corner = PointerState { x: POSITION_MAX, y: POSITION_MAX, buttons: 1 };
    assert_eq!(stage.tell(&[5, 1, 0, 199, 0, 99]), [Input::Pointer(corner)]);
    assert_eq!(stage.tell(&[5, 1, 255, 255, 255, 255]), [Input::Pointer(corner)]);
}

#[test]
fn texts_are_skipped_and_not_kept() {
    let mut stage = Stage::running();
    let mut text = vec![6, 0, 0, 0];
    text.extend((8u32 << 20).to_be_bytes());
    stage.tell(&text);
    for _ in 0..8 << 10 {
        assert!(stage.tell(&[4; 1024]).is_empty());
        assert!(stage.session.input.is_empty());
    }
    assert_eq!(stage.tell(&[4, 1, 0, 0, 0, 0, 0, b'a']).len(), 1);
    // Text and what follows it in one piece.
    let input = stage.tell(&[6, 0, 0, 0, 0, 0, 0, 2, 9, 9, 4, 0, 0, 0, 0, 0, 0, b'a']);
    assert_eq!(input.len(), 1);
}

#[test]
fn a_client_that_does_not_read_bounds_what_waits() {
    let mut stage = Stage::running();
    let large = Size { width: 1024, height: 2048 };
    stage.ramfb.write(0, &setup(AT, large, 0));
    stage.encodings(&[RAW, DESKTOP_SIZE]);
    stage.look();
    for _ in 0..100 {
        stage.ask(Wish::All);
        stage.session.fill(&stage.screen).unwrap();
        stage.encodings(&[RAW, DESKTOP_SIZE, EXTENDED_DESKTOP_SIZE, EXTENDED_KEYS]);
        stage.tell(&[251, 0, 4, 0, 3, 0, 0, 0]);
    }
    let row = 1024 * 64 * 4;
    assert!(stage.session.output.len() <= OUTPUT_LIMIT + row + 4096, "{}", stage.session.output.len());
}

proptest! {
    #[test]
    fn no_client_breaks_a_session(pieces in prop::collection::vec(prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        (prop::sample::select(vec![0u8, 2, 3, 4, 5, 6, 251, 255]), prop::collection::vec(any::<u8>(), 0..24)).prop_map(|(kind, rest)| [&[kind][..], &rest].concat()),
        Just(vec![3, 0, 0, 0, 0, 0, 0, 200, 0, 100]),
        Just(vec![2, 0, 0, 1, 0, 0, 0, 16]),
    ], 0..40), cut in 1usize..50, begun in any::<bool>()) {
        let mut stage = if begun { Stage::running() } else { Stage::new() };
        let bytes = pieces.concat();
        for piece in bytes.chunks(cut) {
            let mut inputs = Vec::new();
            if stage.session.receive(piece, &mut inputs).is_err() {
                return Ok(());
            }
            prop_assert!(stage.session.input.len() <= 8192);
            stage.draw(1, 1, piece.len() as u32);
            stage.heard();
        }
    }

    #[test]
    fn how_the_bytes_come_makes_no_difference(cut in 1usize..20) {
        let said = [&b"RFB 003.008\n\x01\x01"[..], &[2, 0, 0, 1, 0, 0, 0, 16], &[6, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3], &[4, 1, 0, 0, 0, 0, 0, b'a'], &[5, 1, 0, 0, 0, 0]].concat();
        let mut stage = Stage::new();
        let inputs: Vec<_> = said.chunks(cut).flat_map(|piece| stage.tell(piece)).collect();
        prop_assert_eq!(inputs.len(), 2);
        prop_assert_eq!(stage.session.encoding, Encoding::Zrle);
    }
}
