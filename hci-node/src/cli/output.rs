//! Prints what the API returned: as a table for people, or as JSON, YAML or names for programs.
//!
//! Results go to stdout, everything else to stderr, so that a pipe carries data only.

use clap::ValueEnum;
use comfy_table::presets;
use comfy_table::{ContentArrangement, Table};
use serde_json::Value;

use super::exit::{CliError, Exit};

/// The forms of `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people.
    Table,
    /// The table with all its columns.
    Wide,
    /// The API's JSON.
    Json,
    /// The same as YAML.
    Yaml,
    /// Names only, one a line.
    Name,
}

/// How a value is shown in a table; JSON and YAML always carry the raw one.
#[derive(Debug, Clone, Copy)]
pub enum Show {
    /// As it is.
    Text,
    /// A number of bytes with an IEC suffix.
    Bytes,
    /// The length of a list.
    Count,
    /// A fraction of one, as a percentage.
    Percent,
    /// One member of each object in a list.
    Each(&'static str),
}

/// One column of a table.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    title: &'static str,
    pointer: &'static str,
    show: Show,
    wide_only: bool,
}

/// A column that is always there; `pointer` is a JSON pointer (RFC 6901) into the object.
pub const fn column(title: &'static str, pointer: &'static str) -> Column {
    Column { title, pointer, show: Show::Text, wide_only: false }
}

impl Column {
    /// Shows the value in another way than as it is.
    pub const fn shown(mut self, show: Show) -> Self {
        self.show = show;
        self
    }

    /// Shows the column with `-o wide` only.
    pub const fn wide(mut self) -> Self {
        self.wide_only = true;
        self
    }

    fn cell(&self, object: &Value) -> String {
        let value = object.pointer(self.pointer).unwrap_or(&Value::Null);
        match (self.show, value) {
            (_, Value::Null) => "-".to_owned(),
            (Show::Bytes, Value::Number(number)) => bytes(number.as_u64().unwrap_or(0)),
            (Show::Count, Value::Array(items)) => items.len().to_string(),
            (Show::Each(_), Value::Array(items)) if items.is_empty() => "-".to_owned(),
            (Show::Each(member), Value::Array(items)) => items
                .iter()
                .filter_map(|item| item.pointer(member))
                .map(text_of)
                .collect::<Vec<_>>()
                .join(","),
            (Show::Percent, Value::Number(number)) => {
                format!("{:.0} %", number.as_f64().unwrap_or(0.0) * 100.0)
            }
            (_, Value::String(text)) => text.clone(),
            (_, Value::Array(items)) => items.iter().map(text_of).collect::<Vec<_>>().join(","),
            (_, other) => other.to_string(),
        }
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Writes a size with the IEC suffix that keeps it short.
pub fn bytes(size: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut scaled = size as f64;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    if unit == 0 || scaled.fract() < 0.05 {
        format!("{scaled:.0} {}", UNITS[unit])
    } else {
        format!("{scaled:.1} {}", UNITS[unit])
    }
}

/// Prints a list object of the API (`{"items": […]}`) or one object of it.
pub fn print(format: Format, value: &Value, columns: &[Column]) -> Result<(), CliError> {
    let items = value.get("items").and_then(Value::as_array);
    match format {
        Format::Json => line(&serde_json::to_string_pretty(value).map_err(cannot_print)?),
        Format::Yaml => line(serde_saphyr::to_string(value).map_err(cannot_print)?.trim_end()),
        Format::Name => {
            for item in items.map_or(std::slice::from_ref(value), Vec::as_slice) {
                let name = item.get("name").or_else(|| item.get("id")).map(text_of);
                line(&name.unwrap_or_default());
            }
        }
        Format::Table | Format::Wide => {
            let rows = items.map_or(std::slice::from_ref(value), Vec::as_slice);
            line(&table(rows, columns, format == Format::Wide));
        }
    }
    Ok(())
}

fn table(rows: &[Value], columns: &[Column], wide: bool) -> String {
    let columns: Vec<_> = columns.iter().filter(|column| wide || !column.wide_only).collect();
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|column| column.title));
    for row in rows {
        table.add_row(columns.iter().map(|column| column.cell(row)));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Prints one line of a result; a reader that went away (`| head`) ends the output, not the program with an error.
pub fn line(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").is_err() {
        std::process::exit(i32::from(Exit::Ok as u8));
    }
}

fn cannot_print(error: impl std::fmt::Display) -> CliError {
    CliError::new(Exit::Failed, "the answer cannot be printed in this form").why(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_are_short_and_right() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 30), "1 GiB");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
    }

    #[test]
    fn a_table_shows_wide_columns_only_when_asked() {
        const COLUMNS: &[Column] = &[
            column("NAME", "/name"),
            column("SIZE", "/size").shown(Show::Bytes),
            column("ID", "/id").wide(),
        ];
        let rows = [json!({"name": "a", "size": 4096, "id": "x1"}), json!({"name": "bcd", "size": null})];
        assert_eq!(table(&rows, COLUMNS, false), " NAME  SIZE\n a     4 KiB\n bcd   -");
        assert!(table(&rows, COLUMNS, true).contains("x1"));
    }
}
