//! Writes figures in Prometheus' text format: for those that are read out when somebody asks, rather than kept in a
//! registry.

use std::fmt::{Display, Write};

/// What a figure does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// Text that grows family by family.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

impl Exposition {
    /// Adds a family of figures; one without samples is left out. Labels are pairs of name and value.
    pub fn family<'l>(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'l str, String)>, f64)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
        for (labels, value) in samples {
            let labels: Vec<_> =
                labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escape(value))).collect();
            match labels.is_empty() {
                true => self.line(format_args!("{name} {value}")),
                false => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
            }
        }
    }

    /// Adds text that is in the format already.
    pub fn append(&mut self, text: &str) {
        self.text.push_str(text);
        if !text.is_empty() && !text.ends_with('\n') {
            self.text.push('\n');
        }
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }

    fn line(&mut self, line: impl Display) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{line}");
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_in_the_text_format() {
        let mut out = Exposition::default();
        out.family("hci_empty", Kind::Gauge, "Nothing.", []);
        out.family("hci_up", Kind::Gauge, "Whether it is up.", [(vec![], 1.0)]);
        let odd = vec![("name", "a\"b\\c\nd".to_owned()), ("class", "storage".to_owned())];
        out.family("hci_bytes_total", Kind::Counter, "Bytes.", [(odd, 1.5)]);
        assert_eq!(
            out.finish(),
            "# HELP hci_up Whether it is up.\n# TYPE hci_up gauge\nhci_up 1\n\
             # HELP hci_bytes_total Bytes.\n# TYPE hci_bytes_total counter\n\
             hci_bytes_total{name=\"a\\\"b\\\\c\\nd\",class=\"storage\"} 1.5\n"
        );
    }
}
