//! Sizes and durations as people type them: `40GiB`, `512MiB`, `5m`.

use std::time::Duration;

/// Parses a size with an IEC suffix (`KiB`, `MiB`, `GiB`, `TiB`; a plain number is bytes).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" | "K" | "k" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        other => return Err(format!("unknown unit {other:?}; use KiB, MiB, GiB or TiB")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size such as 40GiB"))?;
    number.checked_mul(factor).ok_or_else(|| format!("{text} is too large"))
}

/// Parses a duration such as `500ms`, `90s`, `5m`, `24h`, `7d`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let factor = match unit {
        "ms" => {
            let number = number.parse().map_err(|_| format!("{text:?} is not a duration such as 500ms"))?;
            return Ok(Duration::from_millis(number));
        }
        "s" | "" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        other => return Err(format!("unknown unit {other:?}; use ms, s, m, h or d")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a duration such as 5m"))?;
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(|| format!("{text} is too long"))
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let at = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    (&text[..at], text[at..].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("40GiB"), Ok(40 << 30));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(parse_size("4 parsecs").is_err());
        assert!(parse_size("GiB").is_err());
        assert!(parse_size("99999999999TiB").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert!(parse_duration("ms").is_err());
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        assert!(parse_duration("soon").is_err());
    }
}
