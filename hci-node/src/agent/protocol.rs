//! The agent's protocol: one JSON object a line each way.
//!
//! After a timeout an answer that comes late would be taken for that of the next command. `guest-sync-delimited` ends the confusion: its
//! answer follows a byte 0xff, which no JSON holds, and carries the number that it was asked with. All before it is thrown away.

use std::net::IpAddr;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{AgentFailure, Ended, GuestPid, HowEnded, Output, Progress};
use crate::state::report::GuestInterface;

/// Longest answer.
pub(super) const ANSWER_LIMIT: usize = 1 << 20;
/// Comes before the answer to a synchronization, and makes an agent forget half a command.
const MARK: u8 = 0xff;
/// Most interfaces, and most addresses of each, that are kept.
const MAX_INTERFACES: usize = 16;
const MAX_ADDRESSES: usize = 16;
/// Longest text that is kept.
const MAX_TEXT: usize = 200;

/// What the agent is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command<'a> {
    Info,
    Interfaces,
    FreezeStatus,
    Freeze,
    Thaw,
    Shutdown,
    /// To this many nanoseconds since 1970.
    SetTime(i64),
    Exec(&'a [String]),
    ExecStatus(GuestPid),
}

impl Command<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (name, arguments) = match self {
            Self::Info => ("guest-info", Value::Null),
            Self::Interfaces => ("guest-network-get-interfaces", Value::Null),
            Self::FreezeStatus => ("guest-fsfreeze-status", Value::Null),
            Self::Freeze => ("guest-fsfreeze-freeze", Value::Null),
            Self::Thaw => ("guest-fsfreeze-thaw", Value::Null),
            Self::Shutdown => ("guest-shutdown", json!({ "mode": "powerdown" })),
            Self::SetTime(nanoseconds) => ("guest-set-time", json!({ "time": nanoseconds })),
            Self::Exec(command) => {
                let (path, arguments) =
                    command.split_first().map_or(("", &[][..]), |(path, rest)| (path, rest));
                ("guest-exec", json!({ "path": path, "arg": arguments, "capture-output": true }))
            }
            Self::ExecStatus(pid) => ("guest-exec-status", json!({ "pid": pid.0 })),
        };
        line(name, arguments)
    }
}

/// A synchronization with this number.
pub(super) fn synchronize(number: u32) -> Vec<u8> {
    let mut bytes = vec![MARK];
    bytes.extend(line("guest-sync-delimited", json!({ "id": number })));
    bytes
}

fn line(name: &str, arguments: Value) -> Vec<u8> {
    let mut object = json!({ "execute": name });
    if !arguments.is_null() {
        object["arguments"] = arguments;
    }
    let mut line = object.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Takes a stream of bytes apart into answers.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    buffer: Vec<u8>,
    /// Where to go on looking for the end of the line.
    looked: usize,
    skipping: bool,
}

impl Decoder {
    /// Throws everything away up to the next mark.
    pub(super) fn skip_to_mark(&mut self) {
        self.skipping = true;
        self.looked = 0;
        let rest = std::mem::take(&mut self.buffer);
        self.feed(&rest);
    }

    /// Takes what came.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if self.skipping {
            let Some(mark) = bytes.iter().position(|byte| *byte == MARK) else { return };
            self.skipping = false;
            bytes = &bytes[mark + 1..];
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next answer, if it is all there.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, AgentFailure> {
        let end = self.buffer[self.looked..].iter().position(|byte| *byte == b'\n');
        let line = end.map(|end| self.buffer.drain(..=self.looked + end).collect::<Vec<u8>>());
        self.looked = if line.is_some() { 0 } else { self.buffer.len() };
        let length = line.as_ref().map_or(self.buffer.len(), Vec::len);
        if length > ANSWER_LIMIT {
            return Err(AgentFailure::Nonsense(format!("an answer of more than {ANSWER_LIMIT} bytes")));
        }
        Ok(line)
    }
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

/// What a line says.
pub(super) fn answer(line: &[u8]) -> Result<Value, AgentFailure> {
    let envelope: Envelope = serde_json::from_slice(line).map_err(nonsense)?;
    match (envelope.returned, envelope.error) {
        (_, Some(refusal)) => Err(AgentFailure::Refused(text(&refusal.desc))),
        (Some(value), None) => Ok(value),
        (None, None) => Err(AgentFailure::Nonsense("neither a result nor an error".to_owned())),
    }
}

fn nonsense(error: impl std::fmt::Display) -> AgentFailure {
    AgentFailure::Nonsense(text(&error.to_string()))
}

/// Text of a guest's, as far as it may be shown on a terminal.
fn text(of_guest: &str) -> String {
    of_guest.chars().filter(|letter| !letter.is_control()).take(MAX_TEXT).collect()
}

/// The answer to [`Command::Info`]: the agent's version.
pub(super) fn version(value: Value) -> Result<String, AgentFailure> {
    #[derive(Deserialize)]
    struct Info {
        version: String,
    }
    let info: Info = serde_json::from_value(value).map_err(nonsense)?;
    Ok(text(&info.version))
}

/// The answer to [`Command::FreezeStatus`].
pub(super) fn is_frozen(value: &Value) -> bool {
    value.as_str() == Some("frozen")
}

/// The answer to [`Command::Freeze`] and [`Command::Thaw`]: how many file systems.
pub(super) fn count(value: &Value) -> Result<u64, AgentFailure> {
    value.as_u64().ok_or_else(|| AgentFailure::Nonsense("a number was expected".to_owned()))
}

/// The answer to [`Command::Interfaces`], without the loopback.
pub(super) fn interfaces(value: Value) -> Result<Vec<GuestInterface>, AgentFailure> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Interface {
        name: String,
        hardware_address: Option<String>,
        #[serde(default)]
        ip_addresses: Vec<Address>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Address {
        ip_address: String,
    }
    let told: Vec<Interface> = serde_json::from_value(value).map_err(nonsense)?;
    let kept = told.into_iter().map(|interface| GuestInterface {
        name: text(&interface.name),
        mac: interface.hardware_address.as_deref().map(text),
        addresses: interface
            .ip_addresses
            .iter()
            .filter_map(|address| address.ip_address.parse::<IpAddr>().ok())
            .filter(|address| !address.is_loopback())
            .take(MAX_ADDRESSES)
            .collect(),
    });
    let is_loopback = |interface: &GuestInterface| interface.addresses.is_empty() && interface.name == "lo";
    Ok(kept.filter(|interface| !is_loopback(interface)).take(MAX_INTERFACES).collect())
}

/// The answer to [`Command::Exec`].
pub(super) fn pid(value: Value) -> Result<GuestPid, AgentFailure> {
    #[derive(Deserialize)]
    struct Started {
        pid: i64,
    }
    let started: Started = serde_json::from_value(value).map_err(nonsense)?;
    Ok(GuestPid(started.pid))
}

/// The answer to [`Command::ExecStatus`].
pub(super) fn progress(value: Value) -> Result<Progress, AgentFailure> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Status {
        exited: bool,
        exitcode: Option<i32>,
        signal: Option<i32>,
        #[serde(default)]
        out_data: String,
        #[serde(default)]
        err_data: String,
        #[serde(default)]
        out_truncated: bool,
        #[serde(default)]
        err_truncated: bool,
    }
    let status: Status = serde_json::from_value(value).map_err(nonsense)?;
    if !status.exited {
        return Ok(Progress::Running);
    }
    let how = match (status.exitcode, status.signal) {
        (Some(code), _) => HowEnded::Exit(code),
        (None, Some(signal)) => HowEnded::Signal(signal),
        (None, None) => return Err(AgentFailure::Nonsense("a program that ended by nothing".to_owned())),
    };
    Ok(Progress::Ended(Box::new(Ended {
        how,
        stdout: STANDARD.decode(status.out_data).map_err(nonsense)?,
        stderr: STANDARD.decode(status.err_data).map_err(nonsense)?,
        output: if status.out_truncated || status.err_truncated { Output::Cut } else { Output::Whole },
    })))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(decoder: &mut Decoder) -> Vec<String> {
        std::iter::from_fn(|| decoder.next().unwrap()).map(|line| String::from_utf8(line).unwrap()).collect()
    }

    #[test]
    fn commands_are_lines_of_json() {
        let command = ["/bin/sh".to_owned(), "-c".to_owned(), "echo \"a\nb\"".to_owned()];
        let line = Command::Exec(&command).encode();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let told: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(told["execute"], "guest-exec");
        assert_eq!(told["arguments"]["path"], "/bin/sh");
        assert_eq!(told["arguments"]["arg"], json!(["-c", "echo \"a\nb\""]));
        assert_eq!(Command::Info.encode(), b"{\"execute\":\"guest-info\"}\n");
    }

    #[test]
    fn what_came_before_a_mark_is_forgotten() {
        let mut decoder = Decoder::default();
        decoder.feed(b"{\"return\":1}\n{\"ret");
        decoder.skip_to_mark();
        decoder.feed(b"urn\":2}\n");
        assert!(all(&mut decoder).is_empty());
        decoder.feed(b"{\"return\":3}\n\xff{\"return\":4}\n{\"return\":5}\n");
        assert_eq!(all(&mut decoder), ["{\"return\":4}\n", "{\"return\":5}\n"]);
    }

    #[test]
    fn an_answer_without_an_end_is_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(&vec![b'x'; ANSWER_LIMIT]);
        assert_eq!(decoder.next(), Ok(None));
        decoder.feed(b"x");
        assert!(matches!(decoder.next(), Err(AgentFailure::Nonsense(_))));
    }

    #[test]
    fn answers_of_real_agents_are_understood() {
        let told = json!([
            { "name": "lo", "ip-addresses": [{ "ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8 }] },
            { "name": "eth0", "hardware-address": "02:00:00:00:00:01", "ip-addresses": [
                { "ip-address-type": "ipv4", "ip-address": "10.0.0.5", "prefix": 24 },
                { "ip-address-type": "ipv6", "ip-address": "fe80::1", "prefix": 64 }], "statistics": {} },
        ]);
        let seen = interfaces(told).unwrap();
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].name.as_str(), seen[0].addresses.len()), ("eth0", 2));
        let ended = progress(json!({ "exited": true, "exitcode": 3, "out-data": "aGk=" })).unwrap();
        let Progress::Ended(ended) = ended else { panic!("{ended:?}") };
        assert_eq!(
            (ended.how, ended.stdout.as_slice(), ended.output),
            (HowEnded::Exit(3), &b"hi"[..], Output::Whole)
        );
        assert_eq!(progress(json!({ "exited": false })), Ok(Progress::Running));
        assert_eq!(
            answer(b"{\"error\":{\"class\":\"CommandDisabled\",\"desc\":\"Command \\u001b[31m off\"}}"),
            Err(AgentFailure::Refused("Command [31m off".to_owned()))
        );
    }

    #[test]
    fn a_guest_cannot_fill_the_report() {
        let address = json!({ "ip-address": "10.0.0.1" });
        let interface = json!({ "name": "x\u{7}".repeat(5000), "ip-addresses": vec![address; 5000] });
        let seen = interfaces(Value::Array(vec![interface; 100])).unwrap();
        assert_eq!((seen.len(), seen[0].addresses.len()), (MAX_INTERFACES, MAX_ADDRESSES));
        assert_eq!(seen[0].name, "x".repeat(MAX_TEXT));
    }

    proptest! {
        #[test]
        fn lines_come_out_as_they_went_in_whatever_the_pieces(
            lines in prop::collection::vec("[ -~]{0,40}", 0..10), cuts in prop::collection::vec(1usize..20, 1..50)
        ) {
            let expected: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
            let stream = expected.concat().into_bytes();
            let (mut decoder, mut seen, mut rest) = (Decoder::default(), Vec::new(), &stream[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, behind) = rest.split_at((*cut).min(rest.len()));
                decoder.feed(piece);
                rest = behind;
                seen.extend(all(&mut decoder));
            }
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn hostile_answers_are_taken_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..400), skip: bool) {
            let mut decoder = Decoder::default();
            if skip {
                decoder.skip_to_mark();
            }
            decoder.feed(&bytes);
            while let Ok(Some(line)) = decoder.next() {
                if let Ok(value) = answer(&line) {
                    let _ = (version(value.clone()), interfaces(value.clone()), pid(value.clone()), progress(value));
                }
            }
        }
    }
}
