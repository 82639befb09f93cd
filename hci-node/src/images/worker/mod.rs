//! `hci image-worker`: reads one image from its standard input and says on its standard output what the disk holds.
//!
//! Started by [`super::reader`], never by people. It gives up everything that it does not need before it reads the
//! first byte ([`sandbox`]); then one thread walks the disk from start to end. A panic is as good an end as any: the
//! parent sees the process gone.

mod qcow2;
mod raw;
mod sandbox;
mod source;
mod vmdk;

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    os::fd::AsFd,
    process::ExitCode,
};

use clap::Args as ClapArgs;

use super::protocol::{Encoder, Header, MAX_DATA, Mode};
use crate::{isolation::identity, state::BLOCK_BYTES};
use source::{Content, ImageError, Source};

/// The parent hears something at least this often.
const STEP: u64 = 1 << 30;

/// What the parent asks.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// What to do.
    #[arg(value_enum)]
    mode: Mode,
    /// Where to start, in bytes of the disk.
    #[arg(long, default_value_t = 0)]
    from: u64,
}

/// Runs the role.
pub fn run(args: &Args) -> ExitCode {
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The parent reads the first lines of it; nobody else is there to be told.
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args) -> io::Result<()> {
    identity::close_inherited()?;
    let image = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let pipe = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    sandbox::enter(image.metadata()?.len())?;
    let mut encoder = Encoder::new(BufWriter::with_capacity(2 * MAX_DATA as usize, pipe));
    match describe(image, args, &mut encoder) {
        Ok(()) => encoder.end().map(drop),
        Err(Stop::Image(error)) => encoder.refuse(&error.to_string()).map(drop),
        Err(Stop::Pipe(error)) => Err(error),
    }
}

enum Stop {
    /// The image cannot be used.
    Image(ImageError),
    /// The parent does not listen any more.
    Pipe(io::Error),
}

impl From<ImageError> for Stop {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Pipe(error)
    }
}

fn describe<W: Write>(image: File, args: &Args, encoder: &mut Encoder<W>) -> Result<(), Stop> {
    let (format, mut source) = source::open(image)?;
    let size_bytes = source.size_bytes().next_multiple_of(BLOCK_BYTES);
    let start = args.from.min(size_bytes);
    encoder.header(&Header { format, size_bytes, start })?;
    let mut buffer = vec![0; MAX_DATA as usize];
    let mut offset = start;
    while offset < size_bytes {
        let (content, length) = source.look(offset, STEP.min(size_bytes - offset))?;
        // Formats may map less than a block at a time, which is then read as data.
        let length = length.min(size_bytes - offset);
        let whole = length - length % BLOCK_BYTES;
        match content {
            Content::Zero if whole > 0 => {
                encoder.zero(offset, whole)?;
                offset += whole;
            }
            Content::Data if args.mode == Mode::Probe && whole > 0 => {
                encoder.present(offset, whole)?;
                offset += whole;
            }
            Content::Zero | Content::Data if args.mode == Mode::Probe => {
                encoder.present(offset, BLOCK_BYTES)?;
                offset += BLOCK_BYTES;
            }
            Content::Zero | Content::Data => {
                let take = whole.clamp(BLOCK_BYTES, u64::from(MAX_DATA));
                let piece = &mut buffer[..usize::try_from(take).unwrap_or(0)];
                read(source.as_mut(), piece, offset)?;
                encoder.sparse(offset, piece)?;
                offset += take;
            }
        }
    }
    Ok(())
}

/// Reads a piece; what is behind the end of the disk, up to a whole block, is zero.
fn read(source: &mut dyn Source, piece: &mut [u8], offset: u64) -> Result<(), ImageError> {
    let left = source.size_bytes().saturating_sub(offset);
    let present = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
    piece[present..].fill(0);
    source.read(&mut piece[..present], offset)
}
